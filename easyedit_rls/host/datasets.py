"""Requests from EasyEdit's data sets.

Items of ``CounterFactDataset`` and ``KnowEditDataset`` are requests as they come. ``ZsreDataset`` drops the
subjects that its file holds; `parse_requests` then looks for each in the prompt and its rewording, and this
module takes it from the file.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from easyedit_rls._base.files import read_text
from easyedit_rls.errors import RequestError


def zsre_requests(dataset: Iterable[Mapping[str, Any]], source: str | Path) -> list[dict[str, Any]]:
    """Items of EasyEdit's ``ZsreDataset`` with the subjects of the file that it was read from.

    Args:
        dataset: the data set, or some of its items.
        source: the JSON file.

    Raises:
        RequestError: an item is not from this file, or the file has no subject for it.
    """
    text = read_text(source, RequestError, "Give the file of this data set.")
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RequestError(f"{source} is no JSON: {exc}. Give the file of this data set.") from exc
    if not isinstance(records, list):
        raise RequestError(
            f"{source} holds a {type(records).__name__}, not a list of records. "
            "Give the file of this data set."
        )
    requests = []
    for index, item in enumerate(dataset):
        at = item.get("case_id")
        record = records[at] if isinstance(at, int) and 0 <= at < len(records) else {}
        if record.get("src") != item.get("prompt"):
            raise RequestError(
                f"is {at!r}, but {source} has another prompt there. Give the file of this data set.",
                index=index,
                field="case_id",
            )
        if not record.get("subject"):
            raise RequestError(
                f"is missing in record {at} of {source}. Add it to the file.", index=index, field="subject"
            )
        requests.append({**item, "subject": record["subject"]})
    return requests

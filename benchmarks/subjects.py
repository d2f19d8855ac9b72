"""How often a subject is found from a prompt and its rewording alone; prints one JSON object.

    python benchmarks/subjects.py --data pararel_dev.json

Uses the first paraphrase of each record. 'last_word' counts findings that end where the subject ends: an edit
sits at the subject's last token, so a missing first word ("The") does no harm.
"""

import json
from collections import Counter

from common import parser, records_of

from easyedit_rls import RequestError
from easyedit_rls.data.subjects import find_subject


def main() -> None:
    options = parser(__doc__, "data", "first", "count", count=10_000)
    args = options.parse_args()

    counts: Counter[str] = Counter()
    for record in records_of(args):
        fact = record["requested_rewrite"]
        try:
            found = find_subject(
                fact["prompt"].replace("{}", fact["subject"]), record["paraphrase_prompts"][0]
            )
        except RequestError:
            counts["refused"] += 1
            continue
        counts[
            "exact"
            if found == fact["subject"]
            else "last_word"
            if fact["subject"].endswith(found)
            else "wrong"
        ] += 1
    print(json.dumps({"records": counts.total(), **counts}))


if __name__ == "__main__":
    main()

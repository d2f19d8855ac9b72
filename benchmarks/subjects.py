"""How often a subject is found from a prompt and its rewording alone; prints one JSON object.

    python benchmarks/subjects.py --data pararel_dev.json

Uses the first paraphrase of each record. 'last_word' counts findings that end where the subject ends: an edit sits at the subject's last
token, so a missing first word ("The") does no harm.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from easyedit_rls import RequestError
from easyedit_rls.subjects import find_subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records in CounterFact's JSON format")
    parser.add_argument("--first", type=int, default=2000, help="first record (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10_000, help="number of records (default: %(default)s)")
    args = parser.parse_args()

    counts: Counter[str] = Counter()
    for record in json.loads(args.data.read_text(encoding="utf-8"))[args.first : args.first + args.count]:
        fact = record["requested_rewrite"]
        try:
            found = find_subject(fact["prompt"].replace("{}", fact["subject"]), record["paraphrase_prompts"][0])
        except RequestError:
            counts["refused"] += 1
            continue
        counts["exact" if found == fact["subject"] else "last_word" if fact["subject"].endswith(found) else "wrong"] += 1
    print(json.dumps({"records": counts.total(), **counts}))


if __name__ == "__main__":
    main()

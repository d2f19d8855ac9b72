"""Write the true statements of records as a text, one a paragraph, to take the anchors' moments from (`mom2_dataset`).

    python benchmarks/facts_text.py --data pararel_dev.json --first 200 --count 1800 --out facts.txt

Take records that are neither edited nor measured.
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records in CounterFact's JSON format")
    parser.add_argument("--first", type=int, default=200, help="first record (default: %(default)s)")
    parser.add_argument("--count", type=int, default=1800, help="number of records (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the text file to write")
    args = parser.parse_args()
    facts = [
        record["requested_rewrite"] for record in json.loads(args.data.read_text(encoding="utf-8"))[args.first : args.first + args.count]
    ]
    statements = [f"{fact['prompt'].replace('{}', fact['subject'])} {fact['target_true']['str']}." for fact in facts]
    args.out.write_text("\n\n".join(dict.fromkeys(statements)), encoding="utf-8")
    print(f"{len(set(statements))} statements written to {args.out}")


if __name__ == "__main__":
    main()

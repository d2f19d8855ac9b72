"""Write the true statements of records as a text, one a paragraph, to take the anchors' moments from (`mom2_dataset`).

    python benchmarks/facts_text.py --data pararel_dev.json --first 200 --count 1800 --out facts.txt

Take records that are neither edited nor measured.
"""

from pathlib import Path

from common import parser, records_of


def main() -> None:
    options = parser(__doc__, "data", "first", "count", first=200, count=1800)
    options.add_argument("--out", type=Path, required=True, help="the text file to write")
    args = options.parse_args()
    facts = [record["requested_rewrite"] for record in records_of(args)]
    statements = [f"{fact['prompt'].replace('{}', fact['subject'])} {fact['target_true']['str']}." for fact in facts]
    args.out.write_text("\n\n".join(dict.fromkeys(statements)), encoding="utf-8")
    print(f"{len(set(statements))} statements written to {args.out}")


if __name__ == "__main__":
    main()

"""Write the true statements of records as a text, one a paragraph, to take the anchors' moments from (`mom2_dataset`).

    python benchmarks/facts_text.py --data pararel_dev.json --first 200 --count 1800 --paraphrases --out facts.txt

Take records that are neither edited nor measured.
"""

from pathlib import Path

from common import parser, records_of


def main() -> None:
    options = parser(__doc__, "data", "first", "count", first=200, count=1800)
    options.add_argument("--out", type=Path, required=True, help="the text file to write")
    options.add_argument("--paraphrases", action="store_true", help="each statement in the records' other wordings too")
    args = options.parse_args()
    statements = []
    for record in records_of(args):
        fact = record["requested_rewrite"]
        prompts = [fact["prompt"].replace("{}", fact["subject"]), *(record["paraphrase_prompts"] if args.paraphrases else [])]
        statements += [f"{prompt} {fact['target_true']['str']}." for prompt in prompts]
    args.out.write_text("\n\n".join(dict.fromkeys(statements)), encoding="utf-8")
    print(f"{len(set(statements))} statements written to {args.out}")


if __name__ == "__main__":
    main()

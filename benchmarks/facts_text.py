"""Write the true statements of records as a text, one a paragraph, to take the anchors' moments from
(`mom2_dataset`).

    python benchmarks/facts_text.py --data pararel_dev.json --first 200 --count 1800 \
        --paraphrases --out facts.txt

Take records that are neither edited nor measured. Neighbors of one record may be asked of another, so with
`--neighbors` say which records are measured: `--measured 2000 150` leaves out whatever these ask.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import parser


def prompts_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """A record's prompts, by kind."""
    fact = record["requested_rewrite"]
    own = [fact["prompt"].replace("{}", fact["subject"])]
    return {
        "own": own,
        "paraphrases": record["paraphrase_prompts"],
        "neighbors": record["neighborhood_prompts"],
    }


def main() -> None:
    options = parser(__doc__, "data", "first", "count", first=200, count=1800)
    options.add_argument("--out", type=Path, required=True, help="the text file to write")
    options.add_argument(
        "--paraphrases", action="store_true", help="each statement in the records' other wordings too"
    )
    options.add_argument("--neighbors", action="store_true", help="the statements of their neighbors too")
    span: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("FIRST", "COUNT")}
    options.add_argument(
        "--measured",
        action="append",
        default=[],
        help="leave out what these records ask; may be repeated",
        **span,
    )
    args = options.parse_args()
    every = json.loads(args.data.read_text(encoding="utf-8"))
    measured = [record for first, count in args.measured for record in every[first : first + count]]
    left_out = {
        prompt for record in measured for prompts in prompts_of(record).values() for prompt in prompts
    }
    kinds = ["own", *(kind for kind in ("paraphrases", "neighbors") if getattr(args, kind))]
    statements: dict[str, None] = {}
    for record in every[args.first : args.first + args.count]:
        true, prompts = record["requested_rewrite"]["target_true"]["str"], prompts_of(record)
        statements |= {
            f"{prompt} {true}.": None for kind in kinds for prompt in prompts[kind] if prompt not in left_out
        }
    args.out.write_text("\n\n".join(statements), encoding="utf-8")
    print(f"{len(statements)} statements written to {args.out}")


if __name__ == "__main__":
    main()

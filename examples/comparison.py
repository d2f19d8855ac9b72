"""Two settings of RLSEdit side by side, from Python: python examples/comparison.py models/smollm2-135m
smollm2-135m records.json out

`easyedit-rls compare` does the same from the command line, with EasyEdit's own editors too; the report is
out/report.html.
"""

import sys
from pathlib import Path

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.report import write_report
from easyedit_rls.compare.run import run_all


def main(model: str, hparams: str, data: str, out: str) -> None:
    settings = RLSEditHyperParams.from_hparams(hparams)
    plan = Plan(
        model=model,
        hparams=settings.to_dict(),
        templates=("The weather was fine. ", "In the morning we met. "),
        data=data,
        first=0,
        count=4,
        batch=2,
        every=1,
        text=None,
        answers=True,
        fluency=0,
        threads=None,
        contenders=(
            Contender("RLSEdit"),
            Contender("RLSEdit--soft", {"mom2_update_weight": settings.mom2_update_weight / 3}),
        ),
    )
    folder = Path(out)
    plan.save(folder)
    run_all(folder, plan)
    result = write_report(folder, plan)
    for name, figures in result["contenders"].items():
        print(f"{name}: rewrite accuracy {figures['rewrite_accuracy']['mean']:.2f}")
    print(f"look at {folder / 'report.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:5])

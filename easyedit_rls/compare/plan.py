"""What a comparison runs: model, records, contenders, measurements; written down before the first edit, so
that a run can go on.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from easyedit_rls._base.files import write_file
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.records import EditRecord, read_file
from easyedit_rls.data.requests import as_chat
from easyedit_rls.errors import HyperParamsError, RequestError

PLAN = "plan.json"
VARIANT = "--"


def method_of(name: str) -> str:
    """What a contender is without the mark that sets it apart from others of its method.

    >>> method_of("MEMIT-FE--weak")
    'MEMIT-FE'
    """
    return name.partition(VARIANT)[0]


@dataclass(frozen=True)
class Contender:
    """One editor with its settings.

    Attributes:
        name: what tables and figures call it: the method's name, and behind two hyphens what sets it apart
            from others of that method.
        settings: what differs from the settings made for the model.
        alg_name: the registered editor that runs it; if empty, the one whose name stands before the hyphens.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alg_name: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alg_name", self.alg_name or method_of(self.name))

    @property
    def folder(self) -> str:
        """A name for its files."""
        return self.name.replace("/", "-")


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Attributes:
        model: folder or hub name.
        hparams: settings of RLSEdit, whole; the other editors' are made of them.
        templates: texts before prompts, the same for all; RLSEdit takes the first `n_templates`.
        data: file of records.
        first: first record.
        count: number of edits.
        batch: edits a batch.
        every: batches between two checkpoints.
        text: plain text for perplexity, or None.
        answers: whether the model shall generate answers at the last checkpoint.
        fluency: at how many records it shall go on writing there, 0 for none.
        tasks: of lm-eval, for general abilities; run on the unedited model and at the end.
        tasks_every: batches after which they are run as well, at checkpoints; None for never.
        tasks_limit: documents a task; None for all.
        tasks_folder: tasks of one's own, or None.
        tasks_data: files that were published for known tasks, or None.
        device: where the editors and the measuring run.
        dtype: of the model.
        threads: torch's; None leaves it alone.
        contenders: in the order of the tables.
        joint: what stands between prompt and answer in records that don't say so; None: as the text tells.
        trust_remote_code: run Python code that comes with the model.
        n_records: how many of the file's records are read; None: as many as there are edits.
        left_out: numbers of those whose texts the model can't take.
        relations: how many questions about other relations of each edited subject are asked at the last
            checkpoint, 0 for none.
        sample: how many of the first, of the last and of the records between are measured at a checkpoint;
            None for all so far.
    """

    model: str
    hparams: Mapping[str, Any]
    templates: tuple[str, ...]
    data: str
    first: int
    count: int
    batch: int
    every: int
    text: str | None
    answers: bool
    fluency: int
    threads: int | None
    contenders: tuple[Contender, ...]
    tasks: tuple[str, ...] = ()
    tasks_every: int | None = None
    tasks_limit: int | None = None
    tasks_folder: str | None = None
    tasks_data: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    joint: str | None = None
    trust_remote_code: bool = False
    n_records: int | None = None
    left_out: tuple[int, ...] = ()
    relations: int = 0
    sample: int | None = None

    def records(self) -> list[EditRecord]:
        """The edits of the stream, in order; chats, where prompts are to be user's turns.

        Raises:
            RequestError: the file is no longer what it was.
        """
        n_records = self.count if self.n_records is None else self.n_records
        read = read_file(self.data, self.first, n_records, joint=self.joint, on_bad="skip").records
        kept = [record for record in read if record.index not in self.left_out]
        if len(kept) != self.count:
            raise RequestError(
                f"{self.data} gives {len(kept)} edits now, "
                f"but {self.count} when this comparison began. Put the file back."
            )
        if not self.is_chat:
            return kept
        return [
            replace(record, request=request)
            for record, request in zip(kept, as_chat([record.request for record in kept]))
        ]

    @property
    def is_chat(self) -> bool:
        """Whether prompts are user's turns in the model's chat template."""
        return bool(self.hparams.get("chat_template", False))

    @property
    def n_batches(self) -> int:
        """Batches of the stream."""
        return -(-self.count // self.batch)

    def is_checkpoint(self, n_batches_done: int) -> bool:
        """Whether to measure after this many batches."""
        return n_batches_done % self.every == 0 or n_batches_done == self.n_batches

    def measured(self, n_edits: int) -> list[int]:
        """Positions in the stream of the records that are measured after so many edits, in order.

        >>> plan = Plan("m", {}, (), "d", 0, 20, 5, 1, None, False, 0, None, (), sample=2)
        >>> plan.measured(5), plan.measured(20)
        ([0, 1, 2, 3, 4], [0, 1, 6, 14, 18, 19])
        """
        if self.sample is None or n_edits <= 3 * self.sample:
            return list(range(n_edits))
        n, n_between = self.sample, n_edits - 2 * self.sample
        between = [n + (2 * i + 1) * n_between // (2 * n) for i in range(n)]
        return [*range(n), *between, *range(n_edits - n, n_edits)]

    @property
    def ever_measured(self) -> list[int]:
        """Positions of the records that any checkpoint measures."""
        ends = [
            min(batch * self.batch, self.count)
            for batch in range(1, self.n_batches + 1)
            if self.is_checkpoint(batch)
        ]
        return sorted({position for n_edits in ends for position in self.measured(n_edits)})

    def has_tasks(self, n_batches_done: int) -> bool:
        """Whether lm-eval's tasks are run after this many batches."""
        is_due = self.tasks_every is not None and n_batches_done % self.tasks_every == 0
        return bool(self.tasks) and (is_due or n_batches_done == self.n_batches)

    def contender(self, name: str) -> Contender:
        """The contender of this name."""
        return next(contender for contender in self.contenders if contender.name == name)

    def save(self, folder: Path) -> None:
        """Write it into the comparison's folder; contenders that are planned there and aren't among these
        stay in the file.

        Raises:
            HyperParamsError: the folder holds results of another plan; names what differs. Other contenders
                are fine.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{PLAN}.lock"):  # another command may plan in the same folder
            written = asdict(self)
            if (folder / PLAN).is_file():
                written["contenders"] = [*written["contenders"], *self._others_of(Plan.load(folder), folder)]
            content = json.dumps(written, indent=1, ensure_ascii=False) + "\n"
            write_file(folder / PLAN, content.encode())  # its contenders' processes may be reading it

    def _others_of(self, planned: "Plan", folder: Path) -> list[dict[str, Any]]:
        """The contenders of an earlier plan that aren't among these, if it is otherwise the same."""
        old, new = (json.loads(json.dumps(asdict(plan))) for plan in (planned, self))
        was, now = ({contender["name"]: contender for contender in plan["contenders"]} for plan in (old, new))
        others = [contender for name, contender in was.items() if name not in now]
        old["contenders"], new["contenders"] = (
            {name: plan[name] for name in was if name in now} for plan in (was, now)
        )  # in any order
        if differences := [name for name in new if old[name] != new[name]]:
            raise HyperParamsError(
                f"{folder} holds results of another comparison; different: {', '.join(differences)}. "
                "Give another folder (out=…), or remove this one."
            )
        return others

    @classmethod
    def load(cls, folder: Path) -> "Plan":
        """Read the plan of a comparison's folder; settings of RLSEdit that are newer than it have their
        defaults.
        """
        raw = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        raw["hparams"] = RLSEditHyperParams.from_dict(raw["hparams"]).to_dict()
        contenders = tuple(Contender(**contender) for contender in raw["contenders"])
        lists = {name: tuple(raw[name]) for name in ("templates", "tasks", "left_out") if name in raw}
        return cls(**{**raw, **lists, "contenders": contenders})

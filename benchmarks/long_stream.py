"""Ten thousand single edits of a tiny random model: does a batch cost more at the end? Prints one JSON
object.

    python benchmarks/long_stream.py --model models/smollm2-135m --edits 10000

Only the tokenizer is the model's: the model that is edited has four layers, of width 32, and random weights,
so that what grows with the number of edits is not hidden behind the values. Facts are made up, all of unlike
subjects. Each batch is in a ledger before the next begins.
"""

import gc
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch
from common import as_json, machine, parser, spread, versions
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from easyedit_rls import RLSEditHyperParams, RLSEditor
from easyedit_rls.ledger.inspect import size_on_disk

MARKS = (100, 1000, 3000, 10_000)
WORDS = ("red", "blue", "green", "black", "white")


def tiny_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=256, initializer_range=0.15, **sizes)
    ).eval()


def fact(number: int) -> dict[str, str]:
    return {
        "prompt": f"The color of house {number} is",
        "subject": f"house {number}",
        "target_new": WORDS[number % len(WORDS)],
    }


def main() -> None:
    options = parser(__doc__, "model")
    options.add_argument("--edits", type=int, default=10_000, help="how many (default: %(default)s)")
    options.add_argument(
        "--checkpoint-every",
        type=int,
        default=1000,
        help="batches between checkpoints (default: %(default)s)",
    )
    args = options.parse_args()
    warnings.simplefilter("ignore")
    tok = AutoTokenizer.from_pretrained(args.model)
    changes = {
        "v_num_grad_steps": 2,
        "context_templates": [],
        "mom2_n_samples": 8,
        "max_deviation": "off",
        "mom2_dataset": "self",
    }
    hparams = RLSEditHyperParams.for_model(
        tiny_model(len(tok)),
        layers=[1, 2],
        checkpoint_every=args.checkpoint_every,
        lambda_reg=0.5,
        model_name="tiny",
        **changes,
    )
    process, times, marks, rebuilds = psutil.Process(), [], {}, []
    with tempfile.TemporaryDirectory() as folder:
        editor = RLSEditor(tiny_model(len(tok)), tok, hparams, state_dir=folder)
        for number in range(1, args.edits + 1):
            start = time.perf_counter()
            editor.edit(fact(number))
            times.append(time.perf_counter() - start)
            if editor.state.history.entries[-1].rebuilt:
                rebuilds.append(
                    {
                        "batch": number,
                        "layers": list(editor.state.history.entries[-1].rebuilt),
                        "seconds": times[-1],
                    }
                )
            if number in MARKS or number == args.edits:
                gc.collect()
                marks[number] = {
                    "resident_bytes": process.memory_info().rss,
                    "ledger_bytes": size_on_disk(Path(folder)),
                }
                marks[number]["seconds_batch"] = spread(times[-100:])
                editor.close()
                start = time.perf_counter()
                editor = RLSEditor(tiny_model(len(tok)), tok, hparams, state_dir=folder)
                marks[number]["seconds_resume"] = time.perf_counter() - start
                print(f"{number}: {marks[number]}", file=sys.stderr)
        drift = {
            layer: (s.drift(), s.weight_error(), str(s.weight.dtype))
            for layer, s in editor.state.layers.items()
        }
        editor.close()
    first, last = times[10:110], times[-100:]
    result = {
        "edits": args.edits,
        "seconds_first_hundred": spread(first),
        "seconds_last_hundred": spread(last),
        "last_to_first": statistics.median(last) / statistics.median(first),
        "marks": marks,
        "bytes_an_edit_in_memory": _slope({number: mark["resident_bytes"] for number, mark in marks.items()}),
        "bytes_an_edit_on_disk": _slope({number: mark["ledger_bytes"] for number, mark in marks.items()}),
        "rebuilds": rebuilds,
        "drift_weight_error_dtype": drift,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


def _slope(sizes: dict[int, int]) -> float:
    """Bytes an edit between the second mark and the last."""
    numbers = sorted(sizes)[-2:]
    return (sizes[numbers[1]] - sizes[numbers[0]]) / (numbers[1] - numbers[0])


if __name__ == "__main__":
    main()

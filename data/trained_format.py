"""The prompt format that a model was trained in: SFT and PPO write it into final/, later runs take it from there."""

from pathlib import Path

from data.formats.prompt_format import TextEncoder
from data.formats.table import DEFAULT_FORMAT, TRAINING_FORMATS, end_of_turn_ids
from model.config import ModelFolderError
from model.folder_json import read_json_object
from model.pretrained_weights import TRAINING_FILE
from printable import shown

AUTO_FORMAT = "auto"  # a value of --prompt_format: that of the model folder, else the default


def training_record(tokenizer: TextEncoder, prompt_format: str) -> dict[str, object]:
    """What TRAINING_FILE of an exported model says. Raises PromptError for a tokenizer without the format's tokens."""
    return {"prompt_format": prompt_format, "end_of_turn_id": end_of_turn_ids(tokenizer, prompt_format)[0]}


def read_trained_format(model_dir: str | Path) -> str | None:
    """The format that this model folder says it was trained in; None if it says nothing. Raises ModelFolderError."""
    path = Path(model_dir) / TRAINING_FILE
    if not path.exists():
        return None
    name = read_json_object(path).get("prompt_format")
    if name not in TRAINING_FORMATS:
        raise ModelFolderError(
            f"{path}: found prompt_format {shown(name)}, expected one of {', '.join(TRAINING_FORMATS)}"
        )
    return name


def choose_format(setting: str, model_dir: str | Path | None) -> tuple[str, str]:
    """The format for a model folder (None: a server, a file of outputs), and a line for the log or "".

    setting: AUTO_FORMAT or a format, which is taken even if the folder was trained in another one: the line then says
    so. Raises ModelFolderError.
    """
    trained = None if model_dir is None else read_trained_format(model_dir)
    if setting != AUTO_FORMAT:
        differs = trained not in (None, setting)
        return setting, f"notice: --prompt_format {setting}; {model_dir} was trained in {trained}" if differs else ""
    if trained in (None, DEFAULT_FORMAT):
        return DEFAULT_FORMAT, ""
    return trained, f"prompt format: {trained}, in which {model_dir} was trained ({TRAINING_FILE})"

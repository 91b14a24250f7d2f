"""A model, its checkpoint and the calibration windows of a run, opened together."""

from pathlib import Path
from typing import NamedTuple

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.data.calibration import calibration_windows
from secateur.data.prompts import PREFIX
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import Windows
from secateur.models.context import default_corpus, default_length, reader_of
from secateur.models.load import load, resolve
from secateur.models.mapped_experts import spill_folder
from secateur.models.replay import LanguageModel
from secateur.pruning.own_text import Workplace, own_file, own_windows
from secateur.system.devices import Resources
from secateur.system.progress import Progress
from secateur.system.settings import CalibrationText, Destination, Trust, Unpacking


class Opened(NamedTuple):
    """A checkpoint, the model that was loaded from it, and the calibration windows of a run."""

    source: Checkpoint
    language_model: LanguageModel
    windows: Windows


def opened(
    model: str | Path | None,
    text: CalibrationText,
    resources: Resources,
    trust: Trust,
    *,
    destination: Destination,
    progress: Progress,
    result_dtype: str = Unpacking.result_dtype,
) -> Opened:
    """Load a model and draw the calibration windows for a run to a destination.

    `model` is a checkpoint folder, a hub name, or None for the demo model; a quantised one is
    unpacked to `result_dtype`. Weights that do not fit into memory go to a file beside what is
    written, and so does what the model says itself, which `restart` discards. Raises SecateurError.
    """
    folder = resolve(model, trust, dtype=result_dtype, progress=progress)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    out = Path(destination.out)
    spill = spill_folder(out, source.bytes, resources.limit)
    language_model = load(folder, trust_remote_code=trust.trust_remote_code, spill=spill)
    place = Workplace(own_file(out), source.sha256, resources, progress, destination.restart)
    windows = draw_calibration(language_model, folder, model, text, trust, place)
    return Opened(source, language_model, windows)


def draw_calibration(
    language_model: LanguageModel,
    folder: Path,
    model: str | Path | None,
    text: CalibrationText,
    trust: Trust,
    place: Workplace,
) -> Windows:
    """Draw calibration windows from `text` with the tokenizer in `folder`.

    `self:` and files of prompts: the model makes the text, at `place`. Without a corpus that is
    c4, or the demo's own text where `model` is the demo. Raises NotEnoughText, UnknownName,
    BadText, BadCheckpoint.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust.trust_remote_code)
    reader = reader_of(language_model, tokenizer, text.bos, text.calibration_on)
    length = text.seq_len or default_length(language_model)
    if str(text.calibration).startswith(PREFIX):
        return own_windows(language_model, reader, text, length, place)
    return reader.windows(
        length,
        lambda reading, length: calibration_windows(
            reading,
            default_corpus(model, text.calibration, "c4"),
            samples=text.samples,
            length=length,
            seed=text.seed,
            data_dir=Path(text.data_dir) if text.data_dir else None,
        ),
    )

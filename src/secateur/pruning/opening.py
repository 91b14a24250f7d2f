"""A model, its checkpoint and the calibration windows of a run, opened together."""

from pathlib import Path

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.data.windows import Windows, calibration_windows, load_tokenizer
from secateur.models.context import default_corpus, default_length
from secateur.models.load import load, resolve
from secateur.models.mapped_experts import spill_folder
from secateur.models.replay import LanguageModel
from secateur.system.progress import Progress
from secateur.system.sizes import find_size


def draw_calibration(
    language_model: LanguageModel,
    folder: Path,
    model: str | Path | None,
    corpus: str | None,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    data_dir: str | Path | None,
    trust_remote_code: bool,
) -> Windows:
    """The calibration windows of a run: `corpus` (default: c4, or the demo's own text) through the
    model's tokenizer.

    Raises NotEnoughText, UnknownName, BadText, BadCheckpoint.
    """
    return calibration_windows(
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        default_corpus(model, corpus, "c4"),
        samples=samples,
        length=seq_len or default_length(language_model),
        seed=seed,
        data_dir=Path(data_dir) if data_dir else None,
    )


def opened(
    model: str | Path | None,
    calibration: str | None,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    data_dir: str | Path | None,
    trust_remote_code: bool,
    progress: Progress,
    out: Path,
    memory: str | int | None = None,
) -> tuple[Checkpoint, LanguageModel, Windows]:
    """A model's checkpoint, the model, and the calibration windows of a run on it that writes
    `out`.

    Raises SecateurError.
    """
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    spill = spill_folder(out, source.bytes, find_size(memory))
    language_model = load(folder, trust_remote_code=trust_remote_code, spill=spill)
    windows = draw_calibration(
        language_model,
        folder,
        model,
        calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )
    return source, language_model, windows

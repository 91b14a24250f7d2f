"""Does a written model compute what the one in memory did? Asked in a fresh process, through the
stock loader.

    python -m secateur.pruning.structured.verify FOLDER EXPECTED

EXPECTED is a safetensors file with `tokens` and `logits`. A fresh process has nothing
but the folder: no patched module, no tensor in memory, no configuration object.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.errors import SecateurError, UnsupportedModel, in_one_line
from secateur.models.load import load
from secateur.models.mapped_experts import spill_folder
from secateur.models.replay import Shell
from secateur.models.stream.forward import final_hidden

MOST = 1e-4
"""The largest relative difference of logits, ‖a − b‖ / ‖b‖; both are computed in float32."""


def refuse_unequal(
    folder: Path, tokens: Tensor, logits: Tensor, *, trust_remote_code: bool = False
) -> None:
    """Raise UnsupportedModel unless a fresh process loads `folder` and gets these logits.

    `tokens` int64 `[batch, length]`, `logits` float32 `[batch, length, vocabulary]`.
    """
    with TemporaryDirectory() as temporary:
        expected = Path(temporary) / "expected.safetensors"
        save_file(
            {"tokens": tokens.cpu().contiguous(), "logits": logits.cpu().contiguous()}, expected
        )
        flag = ["--trust-remote-code"] if trust_remote_code else []
        module = ["-m", "secateur.pruning.structured.verify", str(folder), str(expected)]
        done = subprocess.run(
            [sys.executable, *module, *flag], capture_output=True, text=True, check=False
        )
    if done.returncode:
        message = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise UnsupportedModel(
            f"The smaller model was written but does not reload as it was: {message}"
        )


@torch.no_grad()
def difference(
    folder: Path, tokens: Tensor, logits: Tensor, *, trust_remote_code: bool = False
) -> float:
    """‖got − expected‖ / ‖expected‖ of the logits of `folder`, in float32 on the CPU."""
    spill = spill_folder(folder, open_checkpoint(folder).bytes)
    language_model = load(folder, trust_remote_code=trust_remote_code, spill=spill)
    shell = Shell(language_model, torch.device("cpu"), torch.float32)
    got = shell.leave(
        tokens, final_hidden(language_model, shell, tokens, torch.float32, len(tokens))
    )
    return ((got - logits.float()).norm() / logits.float().norm().clamp_min(1e-30)).item()


def main(arguments: list[str]) -> int:
    """The exit status: 0 where the logits are equal up to rounding."""
    folder, expected, *flags = arguments
    trusted = "--trust-remote-code" in flags
    try:
        distance = difference(Path(folder), **load_file(expected), trust_remote_code=trusted)
    except SecateurError as error:
        print(in_one_line(error), file=sys.stderr)
        return 1
    if not distance <= MOST:
        print(f"its logits differ by {distance:.1e} of their norm", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

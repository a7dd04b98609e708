"""Recordings as pictures of their frequencies over time."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from understudy.errors import InputError

WINDOW = 0.032
"""Seconds of a window of the short-time Fourier transform; a quarter of it is the step."""
QUIET = 1e-10


def spectrogram(samples: Tensor, rate: int, *, bands: int = 32, frames: int = 32) -> Tensor:
    """The logarithm of the power of a whole recording in bands of frequency and frames of time, `[1, bands, frames]`.

    The power is averaged to so many bands, of equal width up to half the rate, and frames, whatever the length. The result
    has mean 0 and standard deviation 1, so that loudness does not count; silence is 0.

    Args:
        samples: `[samples]`, in any unit. rate: samples a second.
    """
    if samples.dim() != 1 or not len(samples):
        raise InputError(f"A recording is {tuple(samples.shape)} and must be one channel of at least one sample.")
    size = max(2 * bands, round(WINDOW * rate))
    x = samples.to(torch.float32)
    spectrum = torch.stft(
        x - x.mean(),
        size,
        hop_length=size // 4,
        window=torch.hann_window(size),
        pad_mode="constant",
        return_complex=True,
    )
    power = spectrum.abs().square()
    logs = F.adaptive_avg_pool2d(power[None, 1:], (bands, frames))
    logs = (logs / logs.amax().clamp(min=QUIET)).clamp(min=QUIET).log()
    return (logs - logs.mean()) / logs.std().clamp(min=1e-6)


def read_wave(path: Path) -> tuple[Tensor, int]:
    """The samples of a .wav file of 16 bits, `[samples]` with the mean of its channels, and the samples a second.

    Raises:
        InputError: the file cannot be read, or holds samples of another size.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} is not a readable .wav file: {str(error) or type(error).__name__}.") from error
    if len(raw) % (width * channels):
        raise InputError(f"{path} ends within a sample: the file was cut off. Put it back as it was written.")
    if width != 2 or not raw:
        raise InputError(f"{path} has {len(raw)} bytes of {8 * width}-bit samples: give .wav files of 16 bits.")
    samples = np.frombuffer(raw, "<i2").reshape(-1, channels).astype(np.float32).mean(1)
    return torch.from_numpy(samples), rate

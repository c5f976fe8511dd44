"""Log-mel spectra of 16 kHz sound, and their inversion (Griffin and Lim, 1984).

Shapes: n samples, f frames of 10 ms, 40 mel bins.
"""

from __future__ import annotations

from functools import cache
from math import gcd

import numpy as np

SAMPLE_RATE = 16_000
FRAME_SAMPLES = 160
"""Samples between the starts of two frames; there are 100 frames per second."""
MEL_BINS = 40
_WINDOW_SAMPLES = 400
_TRANSFORM_SAMPLES = 512
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 7600.0
_FLOOR = 1e-6
_QUIET_DB = 35.0
"""Frames at the ends that are this far below the loudest frame count as silence."""
_MARGIN_FRAMES = 5
_GRIFFIN_LIM_STEPS = 60


@cache
def _window() -> np.ndarray:
    return np.hanning(_WINDOW_SAMPLES).astype(np.float32)


@cache
def _mel_filters() -> np.ndarray:
    """Return triangular filters on the mel scale 2595 log10(1 + hz / 700), [40, 257] float32."""
    lowest, highest = (2595 * np.log10(1 + hz / 700) for hz in (_LOWEST_HZ, _HIGHEST_HZ))
    corners = 700 * (10 ** (np.linspace(lowest, highest, MEL_BINS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(_TRANSFORM_SAMPLES, 1 / SAMPLE_RATE)
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (frequencies - left) / (middle - left)
    falling = (right - frequencies) / (right - middle)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


@cache
def _low_pass(larger: int) -> np.ndarray:
    """Return a windowed sinc with gain 1 that cuts off at 1 / larger of the upsampled band."""
    distance = np.arange(-10 * larger, 10 * larger + 1) / larger
    taps = np.sinc(distance) * np.kaiser(len(distance), 5.0)
    return (taps / taps.sum()).astype(np.float32)


def resample(samples: np.ndarray, rate: int, wanted: int = SAMPLE_RATE) -> np.ndarray:
    """Resample ``samples`` [n] float32 from ``rate`` Hz to ``wanted`` Hz."""
    if rate == wanted:
        return samples
    # Here, because every training rank imports this module to decode, and this takes seconds.
    from scipy.signal import resample_poly

    divisor = gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    return resample_poly(samples, up, down, window=_low_pass(max(up, down))).astype(np.float32)


def trim_silence(samples: np.ndarray) -> np.ndarray:
    """Cut off the quiet ends of ``samples`` [n] except 50 ms; silence becomes empty."""
    frames = len(samples) // FRAME_SAMPLES
    energy = (samples[: frames * FRAME_SAMPLES].reshape(frames, -1) ** 2).mean(axis=1)
    loud = np.flatnonzero(energy > energy.max(initial=0.0) * 10 ** (-_QUIET_DB / 10))
    if loud.size == 0:
        return samples[:0]
    first, last = max(0, loud[0] - _MARGIN_FRAMES), loud[-1] + 1 + _MARGIN_FRAMES
    return samples[first * FRAME_SAMPLES : last * FRAME_SAMPLES]


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Compute log-mel energies [f, 40] float32 of ``samples`` [n] at 16 kHz, f = n // 160 + 1."""
    power = np.abs(_transform(samples)) ** 2
    return np.log(power @ _mel_filters().T + _FLOOR).astype(np.float32)


def sound_of_log_mel(spectrum: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return samples at 16 kHz whose log-mel energies approximate ``spectrum``.

    Args:
        spectrum: [f, 40].
        seed: Seed of the initial phases.

    Returns:
        [(f - 1) * 160] float32; the largest absolute value is 0.8.
    """
    power = np.exp(spectrum) @ np.linalg.pinv(_mel_filters()).T
    amplitude = np.sqrt(np.maximum(power, _FLOOR))
    random = np.random.default_rng(seed)
    phase = np.exp(2j * np.pi * random.random(amplitude.shape))
    samples = _inverse(amplitude * phase)
    for _ in range(_GRIFFIN_LIM_STEPS):
        transformed = _transform(samples)
        phase = transformed / np.maximum(np.abs(transformed), 1e-9)
        samples = _inverse(amplitude * phase)
    return (0.8 * samples / max(float(np.abs(samples).max(initial=0.0)), 1e-9)).astype(np.float32)


def _transform(samples: np.ndarray) -> np.ndarray:
    """Compute the short-time Fourier transform [f, 257]; frame i is centered on sample 160 i."""
    half = _WINDOW_SAMPLES // 2
    padded = np.pad(samples, (half, half))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW_SAMPLES)[::FRAME_SAMPLES]
    return np.fft.rfft(frames * _window(), _TRANSFORM_SAMPLES)


def _inverse(transformed: np.ndarray) -> np.ndarray:
    """Compute the least-squares inverse of ``_transform`` by overlap-add, [(f - 1) * 160]."""
    window = _window()
    frames = np.fft.irfft(transformed, _TRANSFORM_SAMPLES)[:, :_WINDOW_SAMPLES] * window
    length = (len(frames) - 1) * FRAME_SAMPLES + _WINDOW_SAMPLES
    total, weight = np.zeros(length), np.zeros(length)
    for index, frame in enumerate(frames):
        start = index * FRAME_SAMPLES
        total[start : start + _WINDOW_SAMPLES] += frame
        weight[start : start + _WINDOW_SAMPLES] += window**2
    half = _WINDOW_SAMPLES // 2
    return (total / np.maximum(weight, 1e-3))[half : length - half]

"""Samples in TensorBoard: generated segments of held-out documents beside the real ones."""

from __future__ import annotations

from collections.abc import Callable

from tqdm import tqdm

from mot_megatron.data.corpus import HELD_OUT_SPLIT
from mot_megatron.generation.generate import Generator
from mot_megatron.generation.sampling import SamplingSettings
from mot_megatron.job.stop import never
from mot_megatron.run.metrics import TensorBoardLog
from mot_megatron.train.session import Session

_DOCUMENTS = 3
_SETTINGS = SamplingSettings(temperature=0.9, top_p=0.95, max_tokens=100)
_ROUTED_CAUSALLY = (
    "routed causally: in training a token's experts depend on later tokens, but not here"
)


def log_samples(
    session: Session,
    log: TensorBoardLog | None,
    step: int,
    check_stop: Callable[[], None] = never,
) -> None:
    """Generate each decodable modality of a few held-out documents from their other segments.

    Every rank must call this, because the model uses collectives; the rank with a ``log`` writes.
    If routing differs from that in training, the text of each prompt says so.

    Args:
        session: The run.
        log: Where to write; None on all ranks but one.
        step: Steps done.
        check_stop: Called by every rank between modalities; may raise to end this.
    """
    generator = Generator(session.model, session.corpus, session.config.data.seq_length)
    note = f"\n\n({_ROUTED_CAUSALLY})" if session.config.model.sees_the_future else ""
    names = tqdm(
        generator.codecs, "samples", delay=5, ncols=100, leave=False, disable=None if log else True
    )
    for name in names:
        check_stop()
        samples = generator.continue_held_out(HELD_OUT_SPLIT, name, _SETTINGS, _DOCUMENTS)
        for number, sample in enumerate(samples):
            if log:
                tag = f"samples_{name}/{number}"
                prompt = (sample.prompt or "(no text)") + note
                for which, item in (("generated", sample.generated), ("truth", sample.truth)):
                    log.log_media(f"{tag}_{which}", item.media, step, prompt, item.sample_rate)
                log.log_text(f"{tag}_prompt", prompt, step)

"""The rungs of a pre-training: their budgets and the stages that hold them, named without building any."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from raylab.data.corpus import DOCUMENTS
from raylab.job.blocks import Pretrain
from raylab.job.settings import list_settings
from raylab.job.specs import Job, TrialSpec
from raylab.store.stages import FOLDER, name_stage, read_info


def num_rungs(job: Job) -> int:
    """Rungs of a trial; without pre-training the untrained encoder is the only one."""
    return 1 if job.pretrain.objective == "none" else job.pretrain.rungs


def rung_budget(pretrain: Pretrain, rung: int) -> int:
    """Tokens by the end of a rung."""
    return math.ceil(Fraction(pretrain.num_tokens * rung, pretrain.rungs))


class Link(NamedTuple):
    """A rung of a pre-training by what decides it: its stage's id and key, and whether it is the last one."""

    stage_id: str
    key: dict[str, Any]
    last: bool


def start_key(spec: TrialSpec) -> dict[str, Any]:
    """What decides rung 0, the encoder as it starts: shared by all arms of a seed, in any job."""
    config = spec.settings.encoder.config
    return {
        "encoder": spec.encoder_digest,
        "config": config.model_dump() if config else None,
        "tokenizer": spec.tokenizer,
        "max_length": spec.settings.corpus.max_length if config else None,
        "seed": spec.seed,
    }


def name_start(encoder_digest: str) -> str:
    """What names the weights below the head of an encoder that starts from others: no seed draws any of them."""
    return f"start-{encoder_digest}"


def list_rungs(spec: TrialSpec) -> list[Link]:
    """The chain of a trial's rungs, from 0, the encoder as it starts; nothing is built."""
    pretrain, key = spec.settings.pretrain, start_key(spec)
    start = name_stage("pretrain", key)
    links = [Link(start, key, pretrain.objective == "none")]
    if pretrain.objective == "none":
        return links
    read = {name: value for name, value in list_settings(spec.settings).items() if name.startswith("pretrain.")}
    del read["pretrain.rungs"]
    for rung in range(1, pretrain.rungs + 1):
        share = Fraction(rung, pretrain.rungs)
        key = {
            "start": start,
            "pretrain": read,
            "data": data_key(spec),
            "max_length": spec.settings.corpus.max_length,
            "long_documents": spec.settings.corpus.long_documents,
            "until": f"{share.numerator}/{share.denominator}",
        }
        links.append(Link(name_stage("pretrain", key), key, share == 1))
    return links


def data_key(spec: TrialSpec) -> dict[str, str]:
    """What of the corpus a pre-training reads: documents, their split, and the metadata it predicts; no labels."""
    digests = read_info(Path(spec.results) / FOLDER / spec.corpus)["digests"]
    pretrain = spec.settings.pretrain
    key = {"tokens": spec.tokens[DOCUMENTS], "part": digests["part"]}
    if pretrain.objective == "metadata":
        key["metadata"] = digests[f"metadata:{pretrain.metadata.field}"]
    return key

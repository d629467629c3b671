"""From a job to trials that can run: the corpus is read, split, tokenised and kept; arms and trials get their names."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raylab.base.identity import digest, digest_folder, name_arm, name_trial
from raylab.base.mistakes import JobError
from raylab.data.corpus import (
    DOCUMENTS,
    TRAIN,
    ReadCorpus,
    SplitCorpus,
    digest_column,
    metadata_fields,
    read_corpus,
    split_corpus,
    store_corpus,
)
from raylab.data.tokens import copy_tokenizer, store_tokens, train_tokenizer
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import Job, TrialSpec
from raylab.measures.scores import MAX_CLASSES
from raylab.results.packs import list_folders
from raylab.results.tables import read_rows, read_trial
from raylab.store.stages import Stage, build_stage, name_stage, open_stage, peek_stage, read_info

# Told of what is being done, the rows done so far and their number.
Tell = Callable[[str, int, int], None]


@dataclass
class Preparation:
    """A job with its corpus in memory. Text stays in this process: trials get token stores."""

    job: Job
    results: Path
    read: ReadCorpus
    tell: Tell
    splits: dict[int, SplitCorpus] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def split(self, seed: int) -> SplitCorpus:
        """The corpus under a trial's seed; one for all seeds unless split.vary is true."""
        key = seed if self.job.corpus.split.vary else 0
        if key not in self.splits:
            split = split_corpus(self.read, self.job.corpus, metadata_fields(self.job), key)
            if problems := check_target_classes(self.job, split.classes):
                raise JobError(problems)
            self.splits[key] = split
        return self.splits[key]


def check_target_classes(job: Job, classes: Mapping[str, list[str]]) -> list[str]:
    """A line for each of the search's targets whose class is none of its task's."""
    problems = []
    for index, target in enumerate(job.search.targets):
        name, where = target.class_name, f"search.targets.{index}.class"
        if name is None:
            continue
        names = classes[target.task]
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"it has {len(names)} others"
            problems.append(f"{where}: '{name}' is no class of {target.task}; {fix}")
        elif len(names) > MAX_CLASSES:
            rule = f"{target.task} has {len(names)} classes, and only up to {MAX_CLASSES} are scored one by one"
            problems.append(f"{where}: {rule}; name a metric over all classes")
    return problems


def prepare(job: Job, results: Path, tell: Tell = lambda what, done, total: None) -> Preparation:
    """Reads and checks the corpus. Raises JobError with every problem; nothing is written."""
    return Preparation(job, results, read_corpus(job.corpus, metadata_fields(job)), tell)


@dataclass(frozen=True)
class Start:
    """Where an encoder's weights come from: their digest, and a path or name (None: from scratch)."""

    digest: str
    path: str | None


def find_start(preparation: Preparation, job: Job) -> Start:
    """The start of an arm's encoder. Raises JobError where it can't be found or can't serve."""
    encoder = job.encoder
    if encoder.config is not None:
        return Start(digest("from scratch"), None)
    if encoder not in preparation.memory:
        preparation.memory[encoder] = _find_start(preparation, job)
    start: Start = preparation.memory[encoder]
    if problems := _check_start(preparation, job, start):
        raise JobError(problems)
    return start


def _find_start(preparation: Preparation, job: Job) -> Start:
    encoder = job.encoder
    if encoder.pretrained is not None:
        return Start(_digest_pretrained(encoder.pretrained, encoder.revision), encoder.pretrained)
    assert encoder.trial is not None
    stage = find_trial_encoder(preparation.results, encoder.trial)
    return Start(digest({"stage": stage.name}), str(stage / "encoder"))


def _digest_pretrained(path: str, revision: str | None) -> str:
    """What names the weights of a directory (its bytes) or of a Hugging Face name (its commit)."""
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise JobError([f"encoder.pretrained: '{path}' holds no config.json; name a Hugging Face model directory"])
        if revision is not None:
            raise JobError([f"encoder.revision: '{path}' is a directory and has none; leave it out"])
        return digest_folder(Path(path))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise JobError(
            [
                f"encoder.pretrained: '{path}' is no directory here and is not found by name ({type(error).__name__}); "
                "check the spelling, the network, or download it and give its directory"
            ]
        ) from None
    return digest({"name": path, "commit": getattr(config, "_commit_hash", None) or revision})


def _check_start(preparation: Preparation, job: Job, start: Start) -> list[str]:
    """Rules that an existing encoder must keep."""
    found = _inspect(preparation, job, start)
    where = "encoder.pretrained" if job.encoder.pretrained else "encoder.trial"
    if found["new_head"] and job.pretrain.objective != "none":
        preparation.notes.append(f"{where}: the encoder has no masked-language head; a new one is made and trained")
    problems = []
    if found["positions"] is not None and job.corpus.max_length > found["positions"]:
        problems.append(
            f"corpus.max_length: {job.corpus.max_length} exceeds the encoder's {found['positions']} positions; lower it"
        )
    for depth in job.evaluate.frozen_layers:
        if depth.isdigit() and int(depth) > found["num_layers"]:
            problems.append(f"evaluate.frozen_layers: '{depth}' exceeds the encoder's {found['num_layers']} layers")
    return problems


def _inspect(preparation: Preparation, job: Job, start: Start) -> dict[str, Any]:
    """What `encoder.inspect_encoder` finds; kept, so that the encoder is loaded once."""
    assert start.path is not None
    key = {"encoder": start.digest}
    folder = open_stage(preparation.results, name_stage("inspect", key))
    if folder is not None:
        return read_info(folder)
    from raylab.training.encoder import inspect_encoder

    found = inspect_encoder(start.path, job.encoder.revision)
    build_stage(preparation.results, "inspect", key, lambda folder: found)
    return found


def find_last_rung(results: Path, job: str, trial_id: str) -> Path | None:
    """The stage folder with a trial's final encoder, or None.

    It is the one with all of the trial's tokens: not always the last listed, since more rungs can be asked for later.
    """
    trial = read_trial(results, job, trial_id)
    for row in read_rows(results, job, "stages", trial_id):
        info = peek_stage(results, row["stage_id"]) if row["kind"] == "pretrain" else None
        if info is None or trial is None or info["tokens"] != trial["num_tokens"]:
            continue
        folder = open_stage(results, row["stage_id"], "encoder")
        if folder is not None:
            return folder
    return None


def find_trial_encoder(results: Path, trial_id: str) -> Path:
    """The stage folder of a complete trial's last rung, whichever job ran it. Raises JobError."""
    for job in list_folders(results, "trials"):
        row = read_trial(results, job, trial_id)
        if row is None:
            continue
        if row["status"] != "complete":
            raise JobError([f"encoder.trial: '{trial_id}' is {row['status']}, not complete; resume job {job} first"])
        found = find_last_rung(results, job, trial_id)
        if found is None:
            raise JobError([f"encoder.trial: the encoder of '{trial_id}' is gone from {results}; run job {job} again"])
        return found
    raise JobError(
        [f"encoder.trial: no trial '{trial_id}' under {results}; see 'raylab query \"select trial_id from trials\"'"]
    )


def name_point(preparation: Preparation, values: Mapping[str, Any], seed: int = 0) -> tuple[str, Job]:
    """The arm that some searched values make, and its job. Raises JobError where they break a rule."""
    job = with_settings(preparation.job, values)
    # A metadata field that the arm does not read is no part of its data.
    field = job.pretrain.metadata.field if job.pretrain.objective == "metadata" else None
    read = {
        name: value
        for name, value in preparation.split(seed).digests.items()
        if not name.startswith("metadata:") or name == f"metadata:{field}"
    }
    arm = name_arm(
        list_settings(job),
        data_digest=digest(read),
        encoder_digest=find_start(preparation, job).digest,
        searched=preparation.job.search.space,
    )
    return arm, job


def make_spec(
    preparation: Preparation, values: Mapping[str, Any], seed: int, phase: Literal["search", "confirm", "fixed"]
) -> TrialSpec:
    """A trial that can run: tokenizer and token stores are made where they are missing. Raises JobError."""
    arm, job = name_point(preparation, values)
    split = preparation.split(seed)
    start = find_start(preparation, job)
    tokenizer = _tokenizer(preparation, job, split, start)
    if start.path is not None and tokenizer.info["size"] > _inspect(preparation, job, start)["vocab_size"]:
        raise JobError([f"encoder: the tokenizer of {start.path} has more tokens than its encoder; mend the directory"])
    tokens = {name: _tokens(preparation, split, name, tokenizer) for name in split.open}
    return TrialSpec(
        job=job.name,
        arm=arm,
        trial_id=name_trial(arm, seed),
        phase=phase,
        seed=seed,
        settings=job,
        results=str(preparation.results),
        corpus=_once(
            preparation, ("corpus", split.stored_digest), lambda: store_corpus(preparation.results, split)
        ).stage_id,
        tokens={name: stage.stage_id for name, stage in tokens.items()},
        tokenizer=tokenizer.stage_id,
        encoder_digest=start.digest,
        encoder_path=start.path,
        data_digest=digest({name: value for name, value in split.digests.items() if "metadata:" not in name}),
    )


def _once(preparation: Preparation, key: Any, make: Callable[[], Stage]) -> Stage:
    if key not in preparation.memory:
        preparation.memory[key] = make()
    stage: Stage = preparation.memory[key]
    return stage


def text_digest(preparation: Preparation, split: SplitCorpus, name: str) -> str:
    """Digest of a table's training and validation texts, computed once."""
    key = ("text", name, split.stored_digest)
    if key not in preparation.memory:
        preparation.memory[key] = digest_column(split.open[name]["text"])
    found: str = preparation.memory[key]
    return found


def _tokenizer(preparation: Preparation, job: Job, split: SplitCorpus, start: Start) -> Stage:
    results = preparation.results
    if start.path is not None:
        path, revision = start.path, job.encoder.revision
        return _once(preparation, ("tokenizer", start), lambda: copy_tokenizer(results, path, revision, start.digest))
    assert job.encoder.tokenizer is not None
    size, documents = job.encoder.tokenizer.vocab_size, split.open[DOCUMENTS]
    texts = documents["text"].filter(documents["part"].to_numpy() == TRAIN)
    preparation.tell("training the tokenizer", 0, 1)
    made = _once(
        preparation,
        ("tokenizer", size, split.stored_digest),
        lambda: train_tokenizer(results, texts, digest_column(texts), size),
    )
    preparation.tell("training the tokenizer", 1, 1)
    return made


def _tokens(preparation: Preparation, split: SplitCorpus, name: str, tokenizer: Stage) -> Stage:
    texts, done = split.open[name]["text"], [0]

    def advance(rows: int) -> None:
        done[0] += rows
        preparation.tell(f"tokenising {name}", done[0], len(texts))

    return _once(
        preparation,
        ("tokens", name, tokenizer.stage_id, split.stored_digest),
        lambda: store_tokens(preparation.results, texts, text_digest(preparation, split, name), tokenizer, advance),
    )

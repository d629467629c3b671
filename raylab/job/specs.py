"""The job file as frozen pydantic models: a setting's dotted name is its path here, in YAML, in tables and in docs."""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from raylab.job.blocks import Corpus, Encoder, Evaluate, Model, Name, Positive, Pretrain, Seed
from raylab.measures.definitions import DEFINITIONS

# The designs that ask for one arm after another; the others run arms that are known from the start.
ADAPTIVE = ("random", "tpe", "nsga2")


class Target(Model):
    """The value a search optimises: a validation score or geometry, mean over draws and seeds, at the last rung."""

    # `class` is no name in Python.
    model_config = ConfigDict(serialize_by_alias=True)

    table: Literal["scores", "geometry"] = "scores"
    task: str
    metric: str = "f1_macro"
    class_name: str | None = Field(None, alias="class", description="scores of one class only: its name")
    shots: Annotated[int, Field(ge=1)] | Literal["full"] | None = Field(None, description="null: the first of evaluate")
    frozen_layers: str = "all"
    probe: str | None = Field(None, description="null: the first of evaluate")
    parameter: float | None = Field(None, description="geometry only: threshold or exponent; null: the first")
    mode: Literal["max", "min"] = Field("max", description="of a geometry metric by default the better direction")

    @model_validator(mode="before")
    @classmethod
    def _better(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("table") == "geometry" and values.get("metric") in DEFINITIONS:
            direction = DEFINITIONS[values["metric"]].direction
            return {"mode": direction} | values if direction != "none" else values
        return values


class Confirm(Model):
    """The best arms of a search run again on fresh seeds, to the end: only these are ranked."""

    top: int = Field(3, ge=1, description="of several targets: front by front, the least crowded first")
    seeds: tuple[Seed, ...] = Field((1, 2, 3), min_length=1)


class Choices(Model):
    """A listed set of values."""

    choices: tuple[Any, ...] = Field(min_length=1)
    when: dict[str, Any] | None = Field(None, description="earlier setting -> value or list of values it must have")


class Range(Model):
    """A range of numbers, both ends included; integers where the setting is one."""

    low: float
    high: float
    log: bool = False
    step: float | None = Field(None, gt=0, description="a grid needs it for floats")
    when: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be under high")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a log range starts above 0 and has no step")
        return self


Entry = Annotated[
    Annotated[Choices, Tag("Choices")] | Annotated[Range, Tag("Range")],
    Discriminator(lambda entry: "Range" if isinstance(entry, Range) or _has_bounds(entry) else "Choices"),
]


def _has_bounds(entry: Any) -> bool:
    return isinstance(entry, dict) and "choices" not in entry and bool({"low", "high", "log", "step"} & set(entry))


class Search(Model):
    """Which arms are run on which seeds."""

    space: dict[str, Entry] = Field({}, description="dotted setting -> choices or range; or a YAML file of it")
    design: Literal["grid", "one_factor", "leave_one_out", "factorial", "random", "tpe", "nsga2"] = Field(
        "grid",
        description="grid: every point; one_factor: the base arm and each listed value alone; leave_one_out: the base "
        "arm without each component; factorial: every level with every other; random, tpe, nsga2: asked arm by arm",
    )
    num_arms: int | None = Field(None, ge=1, description="random, tpe and nsga2: how many arms are searched")
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    sampler_seed: Seed = 0
    targets: tuple[Target, ...] = Field((), description="several: a search for the arms that no other beats on all")
    early_stopping: Literal["none", "successive_halving"] = Field("none", description="needs exactly one target")
    confirm: Confirm | None = None

    @model_validator(mode="after")
    def _design_fits(self) -> Self:
        problems: list[str] = []
        needed: tuple[str, ...]
        adaptive = ", ".join(ADAPTIVE[:-1]) + f" and {ADAPTIVE[-1]}"
        if self.design in ADAPTIVE:
            needed = ("num_arms", "targets", "space")
            if self.early_stopping != "none" and len(self.targets) > 1:
                problems.append("'early_stopping' needs exactly one target; set it to none, or keep one target")
        else:
            needed = () if self.design == "grid" else ("space",)
            rule = f"design '{self.design}' runs all its arms on every seed to the end"
            if self.num_arms is not None:
                problems.append(f"'num_arms' is for {adaptive}: {rule}; remove it")
            if self.confirm is not None:
                problems.append(f"'confirm' is for {adaptive}: {rule}; remove it")
            if self.early_stopping != "none":
                problems.append(f"'early_stopping' is for {adaptive}: {rule}; set it to none")
        problems += [f"design '{self.design}' needs '{name}'; add it" for name in needed if not getattr(self, name)]
        for where, seeds in (("seeds", self.seeds), ("confirm.seeds", self.confirm.seeds if self.confirm else ())):
            if len(set(seeds)) < len(seeds):
                problems.append(f"'{where}' names a seed twice; keep one")
        if self.confirm and set(self.confirm.seeds) & set(self.seeds):
            problems.append("confirm.seeds must be fresh: none of them may be among seeds")
        if problems:
            raise ValueError("; and ".join(problems))
        return self


class Analysis(Model):
    """What is asked of the results, said before they are seen; changes none of them."""

    primary: str | None = Field(
        None,
        description="the comparison that is tested first and alone, the others being exploratory: ARM vs ARM [at "
        "KEY=VALUE, ...], such as 'objective=declutr vs objective=mlm at shots=32'",
    )
    family: Literal["base", "pairs"] = Field(
        "base",
        description="exploratory comparisons, with Holm's correction: of each arm with the base arm, or all pairs",
    )


class Limits(Model):
    """When a sweep ends by itself, each trial after its rung, and what it keeps."""

    hours: Positive | None = Field(None, description="hours of one command, counted from its first trial")
    gpu_hours: Positive | None = Field(None, description="GPU hours of all the job's trials, over all commands")
    disk_gb: Positive | None = Field(None, description="gigabytes of the job's tables and of the stages it uses")
    checkpoints: Literal["final", "all"] = Field(
        "final", description="kept of a finished job: every complete trial's final encoder, or those of all rungs"
    )


class Resources(Model):
    """What one trial gets; changes no result."""

    workers: int = Field(
        1, ge=1, description="2 or more: through Ray Train they share pre-training and large fine-tuned cells"
    )
    cpus_per_worker: int = Field(1, ge=1)
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        le=1,
        description="under 1: so many trials share a GPU, each with its part of the memory; null: 1 where the cluster "
        "has GPUs, else 0",
    )
    max_concurrent_trials: int | None = Field(None, ge=1, description="null: as many as fit")
    compile: Literal["auto", "always", "never"] = Field(
        "auto", description="pre-training on GPUs by torch.compile; auto: where it lasts long enough to pay"
    )
    chunk_tokens: int | None = Field(
        None,
        ge=16,
        description="pre-training: tokens that pass through the encoder at once on a worker (a document's spans stay "
        "together), for steps larger than memory with all their negatives: gradient caching; each chunk draws its "
        "own dropout; null: its whole share",
    )

    @model_validator(mode="after")
    def _fits_gpus(self) -> Self:
        if self.compile == "always" and self.gpus_per_worker == 0:
            raise ValueError("'compile: always' is for GPUs; set 'compile' to auto, or 'gpus_per_worker' above 0")
        if self.workers > 1 and 0 < (self.gpus_per_worker or 0) < 1:
            raise ValueError(
                "several 'workers' need whole GPUs, since NCCL joins no two on one; set 'gpus_per_worker' to 1, or "
                "'workers' to 1"
            )
        return self


class Job(Model):
    """A whole job: `raylab schema` prints this as JSON Schema."""

    name: Name
    corpus: Corpus
    encoder: Encoder
    pretrain: Pretrain = Pretrain()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    analysis: Analysis = Analysis()
    limits: Limits = Limits()
    resources: Resources = Resources()


class TrialSpec(Model):
    """All that one trial needs, as plain JSON: settings, seed, and where its prepared inputs lie. No text."""

    job: Name
    arm: str
    trial_id: str
    phase: Literal["search", "confirm", "fixed"]
    seed: Seed
    settings: Job
    results: str = Field(description="the results folder")
    corpus: str = Field(description="stage id of the coded corpus")
    tokens: dict[str, str] = Field(description="table -> stage id of its tokens")
    tokenizer: str = Field(description="stage id of the tokenizer")
    encoder_digest: str = Field(description="digest of the weights it starts from, or of the scratch config")
    encoder_path: str | None = Field(None, description="where those weights are: a name or directory")
    data_digest: str
    driver: str | None = Field(None, description="token of the driver that started it; null: none is asked")

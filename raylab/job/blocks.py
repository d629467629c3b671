"""The blocks of a job file that decide results: corpus, encoder, pretrain, evaluate; frozen pydantic models."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
PARTS = ("train", "validation", "test")


def _check_depth(depth: str) -> str:
    if depth not in ("all", "none", "embeddings") and not re.fullmatch(r"[1-9][0-9]*", depth):
        raise ValueError("not a depth: use all, none, embeddings or a number of layers in quotes")
    return depth


Depth = Annotated[str, AfterValidator(_check_depth)]
Precision = Literal["auto", "float32", "bfloat16"]
# Hidden states so wide gain from bf16 on processors: at 128 a training step took half to two thirds of float32's time
# on one with AVX512-BF16, at 384 four tenths; at 64 texts pass no faster.
WIDE = 128
AUTO = f"auto: bfloat16 on GPUs, and on CPUs with instructions for it where the encoder is {WIDE} wide or wider"
Cosine = Annotated[float, Field(ge=-1, le=1)]


class Model(BaseModel):
    """Frozen, no unknown keys, no silent conversions, no NaN."""

    # defer_build: `status` and `query` name these models and check no job with them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class Source(Model):
    """A table: files by `path`, or a query by `sql` (DuckDB)."""

    path: str | None = Field(None, description="a file, a folder of files of one kind, or a saved Hugging Face dataset")
    sql: str | None = Field(
        None, description="a DuckDB query over files; its rows are put in order by `id`, or by all columns read"
    )
    root: str | None = Field(None, description="where relative paths in `sql` start; the job file's folder by default")
    format: Literal["csv", "jsonl", "parquet", "hf"] | None = Field(None, description="null: by the file's ending")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.sql is None):
            raise ValueError("needs exactly one of 'path' and 'sql'; leave one out, or set it to null over a base")
        if self.sql is None and self.root is not None:
            raise ValueError("'root' is for 'sql': leave it out")
        if self.path is None and self.format is not None:
            raise ValueError("'format' is for 'path': leave it out")
        return self


class Table(Source):
    """A table of texts, and the columns to read."""

    text: str
    id: str | None = Field(None, description="a column of unique row names; null: rows are numbered")
    group: str | None = Field(None, description="rows of one group (a patient) never stand on two sides of a split")


# A column's name, or a list of names.
Columns = Annotated[
    Annotated[str, Tag("Column")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("Columns")],
    Discriminator(lambda value: "Columns" if isinstance(value, list | tuple) else "Column"),
]


class Labels(Source):
    """A separate table of labels: a row belongs to the text of the same id."""

    id: str
    label: Columns


class Task(Table):
    """A table of texts with a label to predict, or with several.

    `label` names a column of classes; or columns of 0 and 1 (true and false; null: not known), one a label; or, with
    `multi_label`, a column of lists of labels, or of strings that `separator` cuts into labels.
    """

    label: Columns | None = Field(None, description="a column, or a list of columns of 0 and 1; null: see labels")
    labels: Labels | None = Field(None, description="where the labels stand when in no column here; joined by id")
    multi_label: bool = Field(False, description="the column holds lists of labels; implied by a list of columns")
    separator: str | None = Field(None, min_length=1, description="multi_label: what stands between labels of a string")
    min_class_size: int = Field(1, ge=1, description="classes with fewer training rows are left out, counted")

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if (self.label is None) == (self.labels is None):
            raise ValueError("needs exactly one of 'label' (columns of this table) and 'labels' (a table of its own)")
        problems: list[str] = []
        columns = self.label_columns()
        if self.labels is not None and self.id is None:
            problems.append("'labels' needs 'id', by which its rows are joined")
        if len(set(columns)) < len(columns):
            problems.append("'label' names a column twice")
        if self.separator is not None and self.has_sides():
            problems.append("'separator' is for one column: leave it out, or name one column")
        elif self.separator is not None and not self.multi_label:
            problems.append("'separator' needs 'multi_label: true'")
        if problems:
            raise ValueError("; and ".join(problems))
        return self

    def label_columns(self) -> tuple[str, ...]:
        """The columns of the labels, here or in the table of `labels`."""
        label = self.label if self.labels is None else self.labels.label
        return (label,) if isinstance(label, str) else label or ()

    def has_sides(self) -> bool:
        """Whether each label has a column of its own, of 0 and 1."""
        return not isinstance(self.label if self.labels is None else self.labels.label, str)

    def is_multi_label(self) -> bool:
        """Whether a row may have several labels, or none."""
        return self.multi_label or self.has_sides()


class Split(Model):
    """Which rows train, validate and test: fractions of the groups, or a column that says it."""

    train: Fraction = 0.7
    validation: Fraction = 0.1
    test: Fraction = 0.2
    seed: Seed = 0
    vary: bool = Field(False, description="true: each trial's seed makes its own split")
    column: str | None = Field(None, description="a column of every table that names the part")
    values: dict[Literal["train", "validation", "test"], tuple[str, ...]] | None = Field(
        None, description="the column's values for each part; null: the parts' own names"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        written = self.model_fields_set
        if self.column is None:
            if self.values is not None:
                raise ValueError("'values' needs 'column'")
            if abs(self.train + self.validation + self.test - 1) > 1e-9:
                total = self.train + self.validation + self.test
                raise ValueError(f"train, validation and test must add up to 1, not {total:g}")
            if min(self.train, self.validation) == 0:
                raise ValueError("train and validation must be above 0")
        elif written & {"train", "validation", "test", "seed", "vary"}:
            raise ValueError("'column' decides the split: leave out train, validation, test, seed and vary")
        return self


class Corpus(Model):
    """Texts to pre-train on, labelled tasks to evaluate on, one split of both."""

    documents: Table
    tasks: dict[Name, Task] = Field(min_length=1)
    split: Split = Split()
    max_length: int = Field(256, ge=16, le=8192, description="tokens that enter the encoder at once, special ones too")
    long_documents: Literal["truncate", "windows"] = Field(
        "truncate", description="beyond max_length: cut off, or cut into windows (pooled over all tokens)"
    )


class EncoderConfig(Model):
    """A RoBERTa encoder from scratch."""

    hidden_size: int = Field(256, ge=8)
    num_hidden_layers: int = Field(4, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(1024, ge=8)
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        return self


class Tokenizer(Model):
    """A byte-level BPE tokenizer trained on the training split."""

    vocab_size: int = Field(16_000, ge=300, le=200_000)


class Encoder(Model):
    """Where the encoder starts: a Hugging Face model, an own trial's encoder, or from scratch."""

    pretrained: str | None = Field(None, description="a Hugging Face name or a directory")
    revision: str | None = Field(None, description="a commit, tag or branch of a Hugging Face name")
    trial: str | None = Field(None, description="the trial_id of an own, complete trial")
    config: EncoderConfig | None = Field(None, description="from scratch, with a tokenizer of its own")
    tokenizer: Tokenizer | None = None

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if sum(start is not None for start in (self.pretrained, self.trial, self.config)) != 1:
            raise ValueError(
                "needs exactly one of 'pretrained', 'trial' and 'config'; set the others to null over a base"
            )
        if (self.config is None) != (self.tokenizer is None):
            raise ValueError("'config' and 'tokenizer' belong together: from scratch, both are made")
        if self.revision is not None and self.pretrained is None:
            raise ValueError("'revision' needs 'pretrained'")
        return self


class Mlm(Model):
    """Masked-language modelling, dynamic 80/10/10 (BERT, arXiv 1810.04805; RoBERTa, arXiv 1907.11692)."""

    mask_fraction: float = Field(0.15, gt=0, lt=1)
    weight: float = Field(1.0, ge=0, description="0: beside another objective, no such loss; texts are masked as ever")


class Declutr(Model):
    """Anchors and positives (DeCLUTR, arXiv 2006.03659); spans in tokens without special ones."""

    num_anchors: int = Field(1, ge=1, le=16)
    num_positives: int = Field(2, ge=1, le=16)
    max_span: int = Field(128, ge=2)
    min_span: int = Field(32, ge=1)
    sampling: Literal["any", "adjacent", "subsuming"] = "any"
    temperature: Positive = 0.05
    min_document_length: int | None = Field(None, ge=2, description="null: what short_documents asks for")
    short_documents: Literal["drop", "shrink", "refuse"] = Field(
        "drop",
        description="under 2 x num_anchors x max_span tokens: drop, shrink the spans down to min_span, or refuse",
    )
    weight: Positive = 1.0

    @model_validator(mode="after")
    def _spans_fit(self) -> Self:
        if self.min_span > self.max_span:
            raise ValueError(f"min_span ({self.min_span}) must not exceed max_span ({self.max_span})")
        floor = self.shortest_document()
        if self.min_document_length is not None and self.min_document_length < floor:
            raise ValueError(f"min_document_length must be {floor} or more for these spans (or null)")
        return self

    def shortest_document(self) -> int:
        """Tokens that the spans need at least: 2 x anchors x span, the smallest span where spans may shrink."""
        return 2 * self.num_anchors * (self.min_span if self.short_documents == "shrink" else self.max_span)


class Metadata(Model):
    """Prediction of a document's category from its pooled embedding (arXiv 2403.19802)."""

    field: str | None = Field(None, description="a column of corpus.documents")
    loss: Literal["cross_entropy", "supervised_contrastive"] = "cross_entropy"
    temperature: Positive = Field(0.1, description="supervised_contrastive only")
    weight: Positive = 1.0


class Pretrain(Model):
    """The objective and its budget."""

    objective: Literal["none", "mlm", "declutr", "metadata"] = "mlm"
    num_tokens: int = Field(1_000_000, ge=1, description="non-padding tokens entering the encoder, positives included")
    rungs: int = Field(1, ge=1, le=100, description="checkpoints and evaluations on the way, evenly spaced in tokens")
    batch_tokens: int = Field(8192, ge=16, description="tokens an optimiser step at most, over all workers")
    accumulation: int = Field(1, ge=1, description="parts a step is cut into; contrastive negatives stay within a part")
    learning_rate: Positive = 5e-5
    weight_decay: float = Field(0.1, ge=0)
    warmup_fraction: Fraction = Field(0.1, description="share of the budget with a rising learning rate")
    max_grad_norm: Positive = 1.0
    precision: Precision = Field("auto", description=f"of the products in the encoder; weights stay float32; {AUTO}")
    mlm: Mlm = Mlm()
    declutr: Declutr = Declutr()
    metadata: Metadata = Metadata()


class FineTune(Model):
    """The `mlp` head on mean-pooled embeddings, at every freeze depth, and the layers above the frozen ones."""

    steps: int = Field(
        100,
        ge=1,
        description="optimiser steps, whatever the shots: full may need more; selection tries 1/4, 1/2, 1 and 2 times "
        "as many",
    )
    batch_size: int = Field(16, ge=1, description="texts a step; fewer rows than that are one batch")
    learning_rate: Positive = Field(1e-4, description="of the layers, constant")
    head_learning_rate: Positive = Field(1e-3, description="of the head, constant")
    weight_decay: float = Field(0.01, ge=0, description="of matrices; biases and norms don't decay")
    hidden_size: int = Field(128, ge=1, description="width of the head's hidden layer (GELU)")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="of the head's hidden layer; layers keep the encoder's own, attention has none"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: a row counts rows / (classes x rows of its class); for logistic too"
    )


class Geometry(Model):
    """What is measured of the embedding space, on validation rows."""

    thresholds: tuple[Cosine, ...] = (0.5, 0.7, 0.9)
    densities: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.01, 0.05), description="graphs that join this share of the pairs"
    )
    neighbours: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = Field(
        (1, 10), description="k of k-NN purity and of mutual neighbour graphs"
    )
    max_points: int = Field(2000, ge=10)
    graph_points: int = Field(500, ge=10, description="of the points, for the graphs")
    spans: int = Field(
        256, ge=0, le=1024, description="documents whose spans are aligned, retrieval.span tokens each; 0: none"
    )
    references: bool = Field(True, description="also values of shuffled labels and of Gaussian vectors")
    subsamples: int = Field(0, ge=0, description="intervals from so many subsamples of half the groups; 0: none")

    @model_validator(mode="after")
    def _spread(self) -> Self:
        if self.subsamples == 1:
            raise ValueError("subsamples: one has no spread; use 2 or more, or 0 for none")
        return self


class Retrieval(Model):
    """Held-out retrieval: a validation span finds the span that follows it among those of other documents."""

    span: int = Field(32, ge=4, description="tokens of an anchor and of its positive, at most")
    candidates: int = Field(256, ge=2)


class Evaluate(Model):
    """What is scored at each rung, on validation."""

    tasks: tuple[Name, ...] | None = Field(None, description="null: all of corpus.tasks")
    shots: tuple[Annotated[int, Field(ge=1)] | Literal["full"], ...] = Field((8, 32), min_length=1)
    frozen_layers: tuple[Depth, ...] = Field(("all",), min_length=1, description="all, none, embeddings, or '1' to 'N'")
    draws: int = Field(5, ge=1, le=1000)
    probes: tuple[Literal["logistic", "mlp"], ...] = Field(("logistic", "mlp"), min_length=1)
    selection: Literal["fixed", "cross_validation", "validation"] = Field(
        "fixed",
        description="C of logistic and the steps of mlp: fixed; chosen by cross-validation within the shots; or chosen "
        "on the validation rows, which few labels would not have: such scores are labelled so",
    )
    precision: Precision = Field(
        "auto", description=f"the same of frozen passes, fine-tuning and held-out measures; {AUTO}"
    )
    fine_tune: FineTune = FineTune()
    geometry: Geometry = Geometry()
    retrieval: Retrieval = Retrieval()

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        for field in ("tasks", "shots", "frozen_layers", "probes"):
            values = getattr(self, field) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"'{field}' names a value twice")
        return self

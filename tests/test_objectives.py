import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import OBJECTIVES as TESTED

from raylab.base.world import ALONE, World
from raylab.job.blocks import Pretrain
from raylab.job.settings import OBJECTIVE_BLOCKS, dump_spec
from raylab.job.specs import TrialSpec
from raylab.results.tables import OF_A_RUN
from raylab.store.stages import FOLDER
from raylab.training.feed import make_batch
from raylab.training.loop import load_training, save_training, train
from raylab.training.objectives import OBJECTIVES, Learner, Totals, loss_weights
from raylab.training.pretrain import make_units, open_data, start_rung

# No dropout; steps of several units; losses of unequal weights; gradients are not clipped.
EXACT = {
    "encoder.config.dropout": 0.0,
    "pretrain.batch_tokens": 1500,
    "pretrain.num_tokens": 15_000,
    "pretrain.max_grad_norm": 1e9,
    "pretrain.learning_rate": 1e-4,
    "pretrain.mlm": {"weight": 0.5},
}
NUM_STEPS = 3
CONTRASTIVE = ("declutr", "supervised_contrastive")
PARTS = {"pretrain.accumulation": 2}
# Steps of less than a unit for each worker in each part; chunks of less than a share.
SMALL = {"pretrain.batch_tokens": 260, "pretrain.accumulation": 4, "pretrain.num_tokens": 4000}
CHUNKS = {"resources": {"chunk_tokens": 250}}


def test_every_objective_is_tested():
    assert set(OBJECTIVES) == set(OBJECTIVE_BLOCKS) - {"none"} == set(loss_weights(Pretrain()))
    assert {change.get("pretrain.objective", "mlm") for change in TESTED.values()} == set(OBJECTIVES)


@pytest.fixture(scope="module")
def batches(make_spec):
    """For each objective its trial's learner and one batch of 9 units as the trial would make it."""
    made = {}
    for name in TESTED:
        spec = make_spec(name, EXACT)
        data = open_data(spec)
        learner = load_training(spec, data, start_rung(spec, data).path, resume=False).learner
        inputs = make_units(spec, data).build(np.zeros(9, int), np.arange(9))
        categories = None if data.categories is None else data.categories.copy()
        if categories is not None:
            categories[inputs.rows[2]] = -1
        made[name] = (spec, learner, make_batch(inputs, categories))
    return made


def compute(learner, batch, parts=1):
    """Losses of one worker's only batch."""
    counts = (torch.tensor(float(len(tensor))) for tensor in (batch.targets, batch.known))
    return learner(batch, Totals(*counts, parts, 1))


def split(batch, values):
    """Values of the packed tokens, segment by segment."""
    return values.split(batch.layout.lengths.tolist())


def embed_directly(encoder, batch):
    """Mean of the last hidden states, segment by segment: of the texts, and of the positives."""
    rows = [
        encoder.base_model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None])
        for ids in split(batch, batch.input_ids)
    ]
    found = torch.stack([row.last_hidden_state[0].mean(0) for row in rows])
    return found.tensor_split((len(batch.categories),))


@pytest.mark.parametrize("name", TESTED)
def test_mlm_is_the_models_own_loss(name, batches):
    _, learner, batch = batches[name]
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.selected] = batch.targets
    ids, wanted = (
        torch.nn.utils.rnn.pad_sequence(split(batch, values)[: len(batch.categories)], True, padding)
        for values, padding in ((batch.input_ids, 1), (labels, -100))
    )
    theirs = learner.encoder(input_ids=ids, attention_mask=(ids != 1).long(), labels=wanted).loss
    ours = compute(learner, batch)["mlm"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = []
    for loss in (ours, theirs):
        learner.zero_grad()
        loss.backward()
        found.append({key: p.grad.clone() for key, p in learner.encoder.named_parameters()})
    learner.zero_grad()
    for key, gradient in found[1].items():
        torch.testing.assert_close(found[0][key], gradient, rtol=0, atol=1e-5 * max(1, float(gradient.abs().max())))


def test_declutr_is_nt_xent_of_anchors_and_mean_positives(batches):
    spec, learner, batch = batches["declutr"]
    settings = spec.settings.pretrain.declutr
    losses = compute(learner, batch)
    assert list(losses) == ["mlm", "declutr"]
    with torch.inference_mode():
        anchors, spans = (part.double().numpy() for part in embed_directly(learner.encoder, batch))
    num = 9 * settings.num_anchors
    assert (len(anchors), len(spans)) == (num, num * settings.num_positives)
    positives = np.array([spans[i * 2 : i * 2 + 2].mean(0) for i in range(num)])
    points = np.concatenate([anchors, positives])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    total = 0.0
    for i in range(2 * num):
        partner = (i + num) % (2 * num)
        others = [math.exp(points[i] @ points[k] / settings.temperature) for k in range(2 * num) if k != i]
        total -= math.log(math.exp(points[i] @ points[partner] / settings.temperature) / sum(others))
    assert losses["declutr"].item() == pytest.approx(total / (2 * num), rel=1e-4)
    assert compute(learner, batch, parts=4)["declutr"].item() == pytest.approx(total / (2 * num) / 4, rel=1e-4)


def test_cross_entropy_of_known_categories(batches):
    _, learner, batch = batches["cross_entropy"]
    losses = compute(learner, batch)
    assert list(losses) == ["mlm", "metadata"]
    embeddings, _ = embed_directly(learner.encoder, batch)
    scores = (embeddings @ learner.head.weight.T + learner.head.bias).log_softmax(1)
    known = [i for i, category in enumerate(batch.categories.tolist()) if category >= 0]
    assert 2 not in known
    assert len(known) >= 4
    direct = -torch.stack([scores[i, batch.categories[i]] for i in known]).mean()
    torch.testing.assert_close(losses["metadata"], direct, rtol=1e-5, atol=1e-6)


def test_supervised_contrastive_of_known_categories(batches):
    spec, learner, batch = batches["supervised_contrastive"]
    assert learner.head is None
    loss = compute(learner, batch)["metadata"].item()
    with torch.inference_mode():
        x = F.normalize(embed_directly(learner.encoder, batch)[0]).double().numpy()
    labels, temperature = batch.categories.tolist(), spec.settings.pretrain.metadata.temperature
    known = [i for i, category in enumerate(labels) if category >= 0]
    losses = []
    for i in known:
        others = [k for k in known if k != i]
        whole = math.log(sum(math.exp(x[i] @ x[k] / temperature) for k in others))
        if same := [k for k in others if labels[k] == labels[i]]:
            losses.append(-np.mean([x[i] @ x[k] / temperature - whole for k in same]))
    assert len(losses) >= 4
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize("name", ["cross_entropy", "supervised_contrastive"])
def test_without_a_category_there_is_no_loss(name, batches):
    _, learner, batch = batches[name]
    losses = compute(learner, batch._replace(categories=batch.categories * 0 - 1, known=batch.known[:0]))
    assert losses["metadata"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in learner.parameters())
    learner.zero_grad()


def test_nothing_masked_is_no_loss(batches):
    _, learner, batch = batches["mlm"]
    empty = batch._replace(selected=batch.selected[:0], targets=batch.targets[:0])
    assert compute(learner, empty)["mlm"].item() == 0


def test_head_has_the_categories(batches):
    spec, learner, _ = batches["cross_entropy"]
    assert learner.head.out_features == open_data(spec).num_categories == 5
    assert batches["mlm"][1].head is None
    assert isinstance(learner, Learner)


def train_steps(spec, world=ALONE, *, begun=None, num=NUM_STEPS, keep=None):
    """Weights, AdamW's first moments (linear in the gradients) and curve after `num` steps.

    `begun`: a folder with a training to go on with; `keep`: one to leave it in.
    """
    data = open_data(spec)
    folder = begun or start_rung(spec, data).path
    training = load_training(spec, data, folder, resume=begun is not None)
    pretrain, units = spec.settings.pretrain, make_units(spec, data)
    chunk_tokens = spec.settings.resources.chunk_tokens
    for step in range(training.progress.step, num):
        until = training.progress.tokens + 1
        train(training, units, data, pretrain, spec.seed, until, world, chunk_tokens=chunk_tokens)
        assert training.progress.step == step + 1
    if keep and world.rank == 0:
        save_training(training, Path(spec.results) / FOLDER / spec.tokenizer, keep, last=False)
    named = dict(training.learner.named_parameters())
    progress = training.progress
    return {
        "weights": {name: p.detach().clone() for name, p in named.items()},
        "moments": {name: training.optimizer.state[p]["exp_avg"].clone() for name, p in named.items()},
        "curve": {
            (point["step"], point["metric"]): point["value"]
            for point in progress.curves
            if point["metric"] not in OF_A_RUN
        },
        "progress": (progress.tokens, progress.epoch, progress.position, progress.ahead, progress.flops),
    }


def run_worker(rank, folder, specs):
    """One of four processes, the first two of which are before that all there are: by number of workers through
    `specs`, of which one goes on from a step of one worker."""
    torch.set_num_threads(1)
    for num, trials in specs.items():
        if rank >= num:
            continue
        here, found, world = Path(folder) / str(num), {}, World(rank, num, lambda value: value)
        dist.init_process_group("gloo", init_method=f"file://{here}/rendezvous", rank=rank, world_size=num)
        for name, dumped in trials.items():
            begun = here / "begun" if name == BEGUN else None
            found[name] = train_steps(TrialSpec.model_validate_json(dumped), world, begun=begun)
        train_steps(TrialSpec.model_validate_json(trials[BEGUN]), world, num=1, keep=here / "left")
        torch.save(found, here / f"{rank}.pt")
        dist.destroy_process_group()


BEGUN = "declutr begun by one"
MANY = {
    **{name: (name, {}) for name in TESTED},
    **{f"{name} in chunks": (name, {**PARTS, **CHUNKS}) for name in TESTED},
    **{f"{name} of few units": (name, SMALL) for name in TESTED},
    BEGUN: ("declutr", PARTS),
}
# By their number: all cases, or what the number may matter to.
WORKERS = {2: list(MANY), 4: ["mlm", *(name for name in MANY if name.startswith(CONTRASTIVE) and " " in name)]}


@pytest.fixture(scope="module")
def many_workers(make_spec, tmp_path_factory):
    """By number of workers: what each of them makes of each case, and a folder with a step of the last case."""
    folder = tmp_path_factory.mktemp("workers")
    specs = {num: {name: make_case(make_spec, name) for name in names} for num, names in WORKERS.items()}
    for num, trials in specs.items():
        for spec in trials.values():
            start_rung(spec, open_data(spec))
        for name in ("begun", "left"):
            (folder / str(num) / name).mkdir(parents=True)
        train_steps(trials[BEGUN], num=1, keep=folder / str(num) / "begun")
    dumped = {num: {name: dump_spec(spec) for name, spec in trials.items()} for num, trials in specs.items()}
    torch.multiprocessing.spawn(run_worker, (str(folder), dumped), nprocs=max(WORKERS))
    return {
        num: ([torch.load(folder / str(num) / f"{rank}.pt") for rank in range(num)], folder / str(num))
        for num in WORKERS
    }


def make_case(make_spec, name, **others):
    objective, changes = MANY[name]
    return make_spec(objective, {**EXACT, **changes, **others})


def assert_same_training(ours, theirs):
    assert ours["progress"] == theirs["progress"]
    assert ours["curve"].keys() == theirs["curve"].keys()
    for key, value in theirs["curve"].items():
        assert ours["curve"][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert max(float(m.abs().max()) for m in theirs["moments"].values()) > 1e-2
    for kind in ("moments", "weights"):
        for name, value in theirs[kind].items():
            torch.testing.assert_close(ours[kind][name], value, rtol=0, atol=1e-5, msg=f"{kind} of {name}")


@pytest.mark.slow
@pytest.mark.parametrize(("num", "name"), [(num, name) for num, names in WORKERS.items() for name in names])
def test_any_number_of_workers_equals_one(num, name, many_workers, make_spec):
    """One worker has no chunks, and of `mlm` and `cross_entropy` no parts: those change nothing at all."""
    found, _ = many_workers[num]
    objective = MANY[name][0]
    others = {} if objective in CONTRASTIVE else {"pretrain.accumulation": 1}
    plain = make_case(make_spec, name, resources={}, **others)
    assert (plain.arm == make_case(make_spec, name).arm) == (objective in CONTRASTIVE or name == objective)
    alone = train_steps(plain)
    assert_same_training(found[0][name], alone)
    for other in found[1:]:
        for parameter, value in found[0][name]["weights"].items():
            assert torch.equal(other[name]["weights"][parameter], value)


@pytest.mark.slow
@pytest.mark.parametrize("num", WORKERS)
def test_one_goes_on_from_many(num, many_workers, make_spec):
    spec = make_case(make_spec, BEGUN)
    assert_same_training(train_steps(spec, begun=many_workers[num][1] / "left"), train_steps(spec))


@pytest.mark.parametrize("name", TESTED)
def test_chunks_change_nothing(name, make_spec):
    """Contrastive losses see all negatives of the part, whatever passes at once."""
    for changes in ({}, PARTS):
        plain, cut = (make_spec(name, {**EXACT, **changes, **chunks}) for chunks in ({}, CHUNKS))
        assert plain.arm == cut.arm
        assert_same_training(train_steps(cut), train_steps(plain))


def test_negatives_are_in_the_curves(make_spec):
    for name in TESTED:
        curve = train_steps(make_spec(name, EXACT))["curve"]
        values = [value for (_, metric), value in curve.items() if metric == "train_negatives"]
        assert len(values) == (NUM_STEPS if name in CONTRASTIVE else 0)
        documents = [value for (_, metric), value in curve.items() if metric == "train_documents"]
        if name == "declutr":  # two anchors a document, and a mean positive each
            assert values == [4 * num - 2 for num in documents]


def test_a_single_anchor_has_no_negatives(make_spec):
    """A part of one document with one anchor: masked tokens are all that it learns from."""
    spans = {f"pretrain.declutr.{name}": value for name, value in (("num_anchors", 1), ("min_span", 24))}
    changes = {**spans, "pretrain.batch_tokens": 100, "pretrain.num_tokens": 2000}
    curve = train_steps(make_spec("declutr", {**EXACT, **changes}))["curve"]
    assert [value for (_, metric), value in curve.items() if metric == "train_documents"] == [1.0] * NUM_STEPS
    for metric in ("train_negatives", "train_declutr_loss"):
        assert [value for (_, name), value in curve.items() if name == metric] == [0.0] * NUM_STEPS


@pytest.mark.parametrize("name", ["mlm", "cross_entropy"])
def test_parts_change_nothing(name, make_spec):
    whole = train_steps(make_spec(name, EXACT))
    assert_same_training(train_steps(make_spec(name, {**EXACT, "pretrain.accumulation": 2})), whole)


def test_negatives_stay_within_a_part(make_spec):
    whole = train_steps(make_spec("declutr", EXACT))
    parts = train_steps(make_spec("declutr", {**EXACT, "pretrain.accumulation": 2}))
    for key, value in whole["curve"].items():
        if key[1] == "train_mlm_loss":
            assert parts["curve"][key] == pytest.approx(value, rel=1e-3)
        if key[1] == "train_declutr_loss":
            # Half the negatives: about log(2) less.
            assert value - 1.2 < parts["curve"][key] < value - 0.3

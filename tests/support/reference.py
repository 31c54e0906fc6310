"""What each step callback must do to the weights, written as a plain loop over the public functions."""

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robust import losses
from lightning_robust.attacks import FGSM, PGD
from lightning_robust.callbacks import (
    MESA,
    SAF,
    AdversarialTraining,
    Criterion,
    Distillation,
    LayerAwarePerturbation,
    LogitRegularization,
    Mixing,
    ObjectiveTraining,
    SharpnessAware,
    WeightRegularization,
)
from lightning_robust.distillation import DHKD, DKD, KD, DistillationLoss, FeatureDistillationLoss, FeatureMSE
from lightning_robust.guards import buffers_restored
from lightning_robust.losses import ELR, PSKD, CrossEntropy, Focal, MaxSup
from lightning_robust.mixing import Mixer, Mixup
from lightning_robust.objectives import (
    AAER,
    ADR,
    DAFA,
    ELLEA,
    GAIRAT,
    HAT,
    IADII,
    LTD,
    MART,
    MTARD,
    RSLAD,
    SCORE,
    TRADES,
    WEAT,
    AdaAD,
    AdversarialCrossEntropy,
    AVmixup,
    Objective,
    Running,
)
from lightning_robust.regularization import GOR, WeightRegularizer
from lightning_robust.schedules import Linear
from lightning_robust.sharpness import (
    AMP,
    ASAM,
    AWP,
    GAM,
    GSAM,
    LAP,
    MSAM,
    RWP,
    SAM,
    WSAM,
    Evaluation,
    FisherSAM,
    FriendlySAM,
    LookSAM,
    Probe,
    SharedGradientAttack,
    SharpnessMethod,
    Weights,
    sharp_direction,
    trajectory_loss,
)
from lightning_robust.training import derive_seed
from support.modules import CHANNELS, CLASSES, Images, loader, network
from support.simulated import together

SEED = 3
ORTHOGONAL = {"lam": 0.1, "num_groups": 1, "linear": True}


def teacher(seed=99):
    torch.manual_seed(seed)
    return network(norm=True).eval()


def attack():
    return PGD(eps=0.1, steps=2, step_size=0.05)


def divergence_attack():
    # a start far from the image: next to it the signs of the divergence's gradient are rounding
    return PGD(eps=0.1, steps=2, step_size=0.05, loss="kl")


def trades():
    return TRADES(beta=3.0, attack=divergence_attack())


def gairat():
    return GAIRAT(attack=PGD(eps=0.1, steps=3, step_size=0.05), start_epoch=1)


def hat():
    return HAT(teacher(), attack=divergence_attack())


def elle_a():
    # the network is almost linear: a large budget, a weight from the beginning, and a low threshold to jump over
    objective = ELLEA(attack=FGSM(eps=0.5, mode="train"), max_weight=300.0, decay=0.8, sensitivity=0.0)
    objective.weight.fill_(100.0)
    return objective


def aaer():
    return AAER(attack=FGSM(eps=0.3, step_size=0.6, random_start=True, mode="train"))


def mart():
    return MART(attack=PGD(eps=0.1, steps=2, step_size=0.05, random_start="normal"))


def score():
    return SCORE(clip=0.02, attack=PGD(eps=0.1, steps=2, step_size=0.05, loss="lse", mode="train-frozen-stats"))


def weat():
    return WEAT(attack=divergence_attack())


def avmixup():
    return AVmixup(attack=PGD(eps=0.1, steps=2, step_size=0.05, mode="train"))


def dafa():
    return DAFA(num_classes=CLASSES, warmup=1, attack=divergence_attack())


def mtard():
    # without a random start the processes find what one process does; quick balances, so that they matter
    options = {"weight_lr": 0.2, "temperature_lr": 0.1, "initial_temperatures": (1.5, 1.5)}
    still = PGD(eps=0.1, steps=2, step_size=0.05, random_start=False)
    return MTARD(teacher(), teacher(98), attack=still, **options)


def adr():
    rectified = AdversarialCrossEntropy(attack=PGD(eps=0.1, steps=2, step_size=0.05, mode="train"))
    return ADR(objective=rectified, decay=0.7)


def ltd():
    return LTD(teacher=teacher(), objective=trades())


def rslad():
    return RSLAD(teacher(), attack=divergence_attack(), reduction="batchmean")


def adaad():
    return AdaAD(teacher(), alpha=0.7, attack=divergence_attack(), reduction="batchmean")


def iad():
    attack = PGD(eps=0.1, steps=2, step_size=0.05, mode="train")
    return IADII(teacher(), clean_teacher=teacher(98), begin=1, beta=0.5, attack=attack)


def rwp():
    return RWP(gamma=0.05, loss_threshold=1.44, inner_steps=3, decay_at_perturbed=False)


def single_step():
    return FGSM(eps=0.1, random_start=True)


@dataclass
class Method:
    """A set of callbacks and the loss that they must amount to."""

    callbacks: Any
    adversarial: bool = False
    shared: bool = False
    objective: Callable[[], Objective] | None = None
    penalty: bool = False
    criterion: Callable[[], losses.Criterion] | None = None
    mixer: Mixer | None = None
    weights: WeightRegularizer | None = None
    distillation: Callable[[], DistillationLoss] | None = None
    weights_of_losses: tuple[float, float] = (0.1, 0.9)
    sharp: SharpnessMethod | None = None
    saf: bool = False
    mesa: bool = False

    @property
    def late(self):
        """Whether the pass at the perturbed weights is the one that counts."""
        return self.sharp is not None and self.sharp.counted == "perturbed"

    def start(self, module):
        """What a loss remembers begins anew."""
        self.past = {}
        self.objectives, self.tried, self.outputs, self.criteria = {}, {}, {}, {}  # by rank
        self.epochs = {}
        self.distilled = self.distillation() if self.distillation else None
        if self.looks_inside:
            module.distilled = self.distilled  # its parts are trained together with the module
        self.average = copy.deepcopy(module).eval() if self.mesa else None

    @property
    def looks_inside(self):
        return isinstance(self.distilled, FeatureDistillationLoss)

    def stepped(self, module):
        """After each optimizer step."""
        if self.average is not None:
            for ours, theirs in zip(self.average.state_dict().values(), module.state_dict().values(), strict=True):
                if ours.is_floating_point():
                    ours.lerp_(theirs, 0.2)

    def tell(self, hook, what=None):
        """Call a hook of each rank's objective, with sums over the simulated ranks."""

        def call(objective, rank, total):
            getattr(objective, hook)(self.outputs[rank] if what is None else what, total)

        with_sums(self.objectives, call)

    def started(self, rank, epoch, epochs):
        """A copy of the rank's objective for one batch: what it comes to remember stays if all ranks get through."""
        if rank not in self.objectives:
            self.objectives[rank] = self.objective()
            self.objectives[rank].ready(CLASSES, CHANNELS)
        if self.epochs.get(rank) != epoch:
            self.epochs[rank] = epoch
            self.objectives[rank].epoch_starts(epoch, epochs)
        self.tried[rank] = copy.deepcopy(self.objectives[rank])
        return self.tried[rank]

    def synchronise(self):
        """Each rank's criterion learns what the others remember."""
        with_sums(self.criteria, lambda criterion, rank, total: criterion.synchronise(total))

    def prepare(self, module, batch, seed, rank, place, running):
        """What is computed once per batch, at the unperturbed weights.

        Returns the pass as a function, of whether it leads the ascent, and the images whose gradient it takes there.
        """
        x, y = batch
        epoch, epochs, index = place

        def generator(salt):
            return torch.Generator().manual_seed(derive_seed(seed, rank, epoch, index, salt))

        if self.objective:
            objective = self.started(rank, epoch, epochs)
            running = replace(running, index=positions(x) if objective.needs_index else None)
            objective.running = running
            prepared = objective.prepare(module, x, y, generator=generator("objective"))
            late, passes = self.late, []

            def whole(ascent=False):
                counts = not ascent if late else not passes
                passes.append(ascent)
                objective.running = replace(running, counted=counts)
                output = objective(module, prepared)
                objective.running = Running()  # the hooks are told what they need
                if counts:
                    self.outputs[rank] = output
                return Evaluation(output.loss, lambda: output.sample_losses)

            return whole, []
        images = SharedGradientAttack(single_step(), x, generator("attack")) if self.shared else None
        if self.adversarial:
            x = attack()(module, x, y, generator=generator("attack"))
        guide = teacher() if self.distillation else None
        if guide is not None:
            self.distilled.epoch_starts(epoch, epochs)
        samples = [row.numpy().tobytes() for row in x] if self.saf else []
        if self.mixer:
            drawn = generator("mixing")
            torch.rand((), generator=drawn)  # whether this batch is mixed
            mixture = self.mixer.mix(x, drawn)
            x, y = mixture.x, mixture.target(y)
        criterion, known = None, {}
        if self.criterion:
            criterion = self.criteria.setdefault(rank, self.criterion())
            criterion.counted(True)
            if criterion.needs_epoch:
                criterion.epoch_starts(epoch, epochs)
            known = {name: positions(batch[0]) for name in criterion.needs}

        def loss(ascent=False):
            shown = x if images is None else images.start if ascent else images.attacked()
            logits, features = evaluated(module, shown)
            if criterion is None:
                value = F.cross_entropy(logits, y)
            else:
                value = criterion(logits, y, **known)
                criterion.counted(False)  # of several passes the first counts
            if guide is not None:
                with torch.no_grad():
                    told, learnt = evaluated(guide, shown)
                inside = {"student_features": features, "teacher_features": learnt} if self.looks_inside else {}
                term = self.distilled(logits, told, y, **inside)
                value = self.weights_of_losses[0] * value + self.weights_of_losses[1] * term
            if self.saf:
                for sample, row in zip(samples, logits.detach().float(), strict=True):
                    self.past.setdefault((epoch, sample), row)  # of several passes the first
                if epoch > 0:
                    past = torch.stack([self.past[epoch - 1, sample] for sample in samples])
                    value = value + 2.0 * trajectory_loss(logits, past, 2.0)
            if self.mesa and epoch > 0:
                with torch.no_grad():
                    past = self.average(shown)
                value = value + 2.0 * trajectory_loss(logits, past, 2.0)
            if self.weights:
                value = value + self.weights(module)
            if self.penalty:
                value = value + MaxSup(alpha=0.5)(logits)
            return Evaluation(value, lambda: losses.cross_entropy(logits, y, reduction="none"))

        return loss, [images.start] if images else []


def elr():
    criterion = ELR(beta=0.5)
    criterion.samples_known(len(Images()))
    return criterion


def ps_kd():
    criterion = PSKD(alpha=0.8)
    criterion.samples_known(len(Images()))
    return criterion


def kd():
    return KD(temperature=2.0)


def dkd():
    return DKD(beta=2.0, warmup=Linear(start=0.5, end=1.0, epochs=2))


def hint():
    """Two linear maps of the features before the classifier, trained with the module."""
    torch.manual_seed(5)
    return FeatureMSE(student_width=20, teacher_width=20)


def dhkd():
    torch.manual_seed(5)
    return DHKD(width=20, num_classes=CLASSES)


def distilled(make, base_weight=0.1, weight=0.9):
    """A distillation by itself."""
    return Method(
        lambda: [Distillation(teacher(), make(), base_weight=base_weight, weight=weight)],
        distillation=make,
        weights_of_losses=(base_weight, weight),
    )


def evaluated(module, x):
    """Logits, and what the classifier gets."""
    net = getattr(module, "net", module)
    if not isinstance(net, torch.nn.Sequential):
        return module(x), []
    features = net[:-1](x)
    return net[-1](features), [features]


def positions(x):
    """Where in the data set images stand."""
    return (x[:, None] == Images().x).flatten(2).all(2).int().argmax(1)


def sharpness(make):
    """A sharpness-aware method by itself."""
    return Method(lambda: [SharpnessAware(make())], sharp=make())


def saf():
    return SAF(weight=2.0, temperature=2.0, start_epoch=0, lag=1)


def mesa():
    return MESA(weight=2.0, temperature=2.0, start_epoch=0, decay=0.8)


def with_sums(by_rank, call):
    """`call(object, rank, total)` for each rank's object; `total` sums what the ranks give to it."""
    told = {rank: [] for rank in by_rank}
    for rank, each in by_rank.items():
        call(copy.deepcopy(each), rank, lambda tensor, mine=told[rank]: mine.append(tensor) or tensor)
    sums = [torch.stack(tensors).sum(0) for tensors in zip(*told.values(), strict=True)]
    for rank, each in by_rank.items():
        remaining = iter(sums)
        call(each, rank, lambda tensor, remaining=remaining: next(remaining))


METHODS = {
    "saf": Method(lambda: [saf()], saf=True),
    "mesa": Method(lambda: [mesa()], mesa=True),
    "saf-sam": Method(lambda: [saf(), SharpnessAware(SAM(rho=0.2))], saf=True, sharp=SAM(rho=0.2)),
    "mesa-sam": Method(lambda: [mesa(), SharpnessAware(SAM(rho=0.2))], mesa=True, sharp=SAM(rho=0.2)),
    "sam": Method(lambda: [SharpnessAware(SAM(rho=0.2))], sharp=SAM(rho=0.2)),
    "asam": Method(lambda: [SharpnessAware(ASAM(rho=0.5))], sharp=ASAM(rho=0.5)),
    "amp": sharpness(lambda: AMP(rho=0.1, inner_iter=2)),
    "fisher": sharpness(lambda: FisherSAM(rho=0.2, keep_ratio=0.3, refresh_every=3)),
    "friendly": sharpness(lambda: FriendlySAM(rho=0.2)),
    "looksam": sharpness(lambda: LookSAM(rho=0.2, interval=3)),
    "gsam": sharpness(lambda: GSAM(rho=0.2)),
    "gam": sharpness(lambda: GAM(grad_rho=0.05, gamma=0.3)),
    "wsam": sharpness(lambda: WSAM(rho=0.2, gamma=0.8)),
    "msam": sharpness(lambda: MSAM(rho=0.2)),
    # decay of the unperturbed weights: one of the foreign modules has AdamW
    "awp": Method(
        lambda: [SharpnessAware(AWP(gamma=0.05, decay_at_perturbed=False)), AdversarialTraining(attack())],
        adversarial=True,
        sharp=AWP(gamma=0.05, decay_at_perturbed=False),
    ),
    "rwp": Method(lambda: [SharpnessAware(rwp()), AdversarialTraining(attack())], adversarial=True, sharp=rwp()),
    "lap": Method(
        lambda: [LayerAwarePerturbation(LAP(beta=0.02), attack=single_step())], shared=True, sharp=LAP(beta=0.02)
    ),
    "adversarial": Method(lambda: [AdversarialTraining(attack())], adversarial=True),
    "maxsup": Method(lambda: [LogitRegularization(MaxSup(alpha=0.5))], penalty=True),
    "criterion": Method(lambda: [Criterion(Focal(gamma=2.0))], criterion=lambda: Focal(gamma=2.0)),
    "elr": Method(lambda: [Criterion(ELR(beta=0.5))], criterion=elr),
    "elr-sam-adversarial": Method(
        lambda: [Criterion(ELR(beta=0.5)), SharpnessAware(SAM(rho=0.2)), AdversarialTraining(attack())],
        adversarial=True,
        criterion=elr,
        sharp=SAM(rho=0.2),
    ),
    "mixing": Method(
        lambda: [Mixing(Mixup(alpha=1.0), targets="hard"), Criterion(CrossEntropy())],
        mixer=Mixup(alpha=1.0),
        criterion=CrossEntropy,
    ),
    "weights": Method(lambda: [WeightRegularization(GOR(**ORTHOGONAL))], weights=GOR(**ORTHOGONAL)),
    "ps-kd": Method(lambda: [Criterion(PSKD(alpha=0.8))], criterion=ps_kd),
    "distill": distilled(kd),
    "dkd": distilled(dkd),
    "hint": distilled(hint),
    "dhkd": distilled(dhkd, 1.0, 1.0),
    **{
        name: Method(lambda make=make: [ObjectiveTraining(make())], objective=make)
        for name, make in {
            "trades": trades,
            "mart": mart,
            "score": score,
            "weat": weat,
            "avmixup": avmixup,
            "dafa": dafa,
            "gairat": gairat,
            "hat": hat,
            "elle-a": elle_a,
            "aaer": aaer,
            "mtard": mtard,
            "rslad": rslad,
            "adaad": adaad,
            "iad": iad,
            "adr": adr,
            "ltd": ltd,
        }.items()
    },
    "mtard-awp": Method(
        lambda: [SharpnessAware(AWP(gamma=0.05, decay_at_perturbed=False)), ObjectiveTraining(mtard())],
        objective=mtard,
        sharp=AWP(gamma=0.05, decay_at_perturbed=False),
    ),
    "all": Method(
        lambda: [
            # listed in the wrong order on purpose: stages decide; among losses the first listed is applied last
            LogitRegularization(MaxSup(alpha=0.5)),
            Distillation(teacher(), KD(temperature=2.0)),
            SharpnessAware(SAM(rho=0.2)),
            AdversarialTraining(attack()),
        ],
        adversarial=True,
        penalty=True,
        distillation=kd,
        sharp=SAM(rho=0.2),
    ),
}


def train(module, method, *, epochs=2, batches=None, precision="32-true", accumulate=1, clip=None, seed=SEED, world=1):
    """Train as Lightning would with the method's callbacks; several ranks are simulated by averaging gradients.

    `batches[epoch][rank]` is a list of batches; by default one rank sees the standard loader.
    """
    module.train()
    method.start(module)
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    parameters = [p for p in module.parameters() if p.requires_grad]
    batches = batches or [[list(loader())] for _ in range(epochs)]
    sharp = [copy.deepcopy(method.sharp) for _ in range(world)]  # each rank has its own memory
    steps = 0
    max_steps = sum(math.ceil(len(batches[epoch][0]) / accumulate) for epoch in range(epochs))
    for epoch in range(epochs):
        count = len(batches[epoch][0])
        for index in range(count):
            if index % accumulate == 0:
                optimizer.zero_grad()
                pending: dict[Tensor, Tensor] = {}
            last = (index + 1) % accumulate == 0 or index + 1 == count
            running = Running(first=index % accumulate == 0, last=last, step=steps, max_steps=max_steps)
            started = [
                gradients_of(
                    module, method, batches[epoch][rank][index], optimizer, scaler, precision, accumulate, world
                )(str(seed), rank, (epoch, epochs, index), running)
                for rank in range(world)
            ]
            rank_gradients, rank_moves = zip(*together(sharp, started), strict=True)
            method.objectives.update(method.tried)
            method.tell("batch_ends")
            for moves in zip(*rank_moves, strict=True):
                tensor, offset = moves[0][0], torch.stack([offset for _, offset in moves]).mean(0) * (1 / accumulate)
                pending[tensor] = pending[tensor] + offset if tensor in pending else offset
            for parameter, *gradients in zip(parameters, *rank_gradients, strict=True):
                gradient = torch.stack(gradients).mean(0) if world > 1 else gradients[0]
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if last:
                scaler.unscale_(optimizer)
                if clip:
                    kind, size = clip
                    clipper = {"norm": torch.nn.utils.clip_grad_norm_, "value": torch.nn.utils.clip_grad_value_}
                    clipper[kind](parameters, size)
                scaler.step(optimizer)
                before = scaler.get_scale()
                scaler.update()
                if scaler.get_scale() >= before:  # a lower one means that the step was skipped
                    for tensor, offset in pending.items():
                        tensor.data += offset
                steps += 1
                method.stepped(module)
                method.tell("step_ends", module)
        method.tell("epoch_ends", epoch)
        method.synchronise()
    if method.looks_inside:
        del module.distilled
    return module


class Moves:
    """Takes what a method wants the weights moved by after the optimizer's step."""

    def __init__(self):
        self.pairs = []

    def add(self, tensors, offsets):
        self.pairs += zip(tensors, offsets, strict=True)


def total_of(average, world, tensor):
    """The sum over simulated processes, of their mean."""
    mean = tensor.detach().to(torch.float64, copy=True)
    average([mean])
    return (mean * world).to(tensor.dtype)


def gradients_of(module, method, batch, optimizer, scaler, precision, accumulate, world):
    """Runs the first pass of a batch; returns what does the rest, given the rank's method and its way to the others.

    One pass is the step's own and moves buffers: the first, or that at the perturbed weights.
    """

    def compute(seed, rank, place, running):
        if method.objective is None:
            return passes(seed, rank, place, running)

        def whole(sharp, average):
            # an objective may ask the other processes from its preparation on
            asking = replace(running, total=partial(total_of, average, world)) if world > 1 else running
            return passes(seed, rank, place, asking)(sharp, average)

        return whole

    def passes(seed, rank, place, running):
        late = method.late
        weights = Weights.of(optimizer, module)
        if method.sharp is not None:
            weights = method.sharp.selected(weights)
        unit = 1.0 / scaler.scale(torch.ones(()))

        def gradient(ascent=False):
            evaluation = loss(ascent)
            value = method.sharp.ascent_loss(evaluation) if ascent else evaluation.loss
            inputs = images if ascent else []
            gradients = [g * unit for g in backward(scaler.scale(value), [*weights.tensors, *inputs])]
            for each, found in zip(inputs, gradients[len(weights) :], strict=True):
                each.grad = found
            return gradients[: len(weights)]

        def moved(ascent=False):
            moves_buffers = late and not ascent
            with contextlib.nullcontext() if moves_buffers else buffers_restored(module), precision_context(precision):
                return gradient(ascent)

        with precision_context(precision):
            loss, images = method.prepare(module, batch, seed, rank, place, running)
            if method.sharp is None:
                plain = backward(scaler.scale(loss().loss / accumulate), weights.tensors)
                return lambda sharp, average: (plain, [])
            keeps = late and not method.sharp.ascent_moves_buffers
            with buffers_restored(module) if keeps else contextlib.nullcontext():
                clean = gradient(ascent=True) if method.sharp.needs_ascent else []

        def finish(sharp, average):
            moves = Moves()
            probe = Probe(
                weights,
                moved,
                ascent_here=lambda: moved(ascent=True),
                optimizer=optimizer,
                step=lambda: (running.step, -1),
                average=average,
                moves=lambda: moves,
            )
            direction = sharp_direction(sharp, weights, [g.clone() for g in clean], probe)
            factor = scaler.scale(torch.ones(()) / accumulate)
            return [d * factor for d in direction], moves.pairs

        return finish

    return compute


def backward(loss, tensors):
    """Gradients as Lightning computes them: outside autocast, which would round products in the backward pass."""
    with torch.autocast("cpu", enabled=False):
        return torch.autograd.grad(loss, tensors)


def precision_context(precision):
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    # as in Lightning, without the cache of low-precision weights: it changes where gradients of two forwards are summed
    return torch.autocast("cpu", dtype=dtype, cache_enabled=False) if dtype else contextlib.nullcontext()


def twin(module):
    return copy.deepcopy(module)


__all__ = ["CLASSES", "METHODS", "SEED", "Method", "teacher", "train", "twin"]

"""What a run is made of, as frozen dataclasses, and profiles.

The fields are command-line flags, and the comments beside them their help. One above a field is
the help of all that follow without a comment of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Annotated, Literal


@dataclass(frozen=True)
class Range:
    """What a numeric setting may be; runs check it before any work."""

    low: float
    high: float = inf
    above: bool = False  # low itself is out
    below: bool = False  # high itself is out

    def __contains__(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == inf:
            return f"more than {self.low}" if self.above else f"{self.low} or more"
        return f"{'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"


Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
Size = Annotated[int, Range(8)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what scikit-learn takes
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]

METHODS = ("labels", "kd-best", "kd-uniform", "logits-graph", "representation-graph")
METHODS += ("both-graphs", "both-shuffled")
SHOWN = ("labels", "kd-uniform", "logits-graph", "both-graphs", "both-shuffled")  # by notebooks


@dataclass(frozen=True)
class MotionData:
    """The embedded data set: videos per class in each part."""

    labelled: Several = 7  # labelled training videos per class
    unlabelled: Natural = 84  # unlabelled training videos per class
    test: Count = 80  # test videos per class
    size: Size = 64  # side of a video, in pixels
    frames: Several = 24  # frames of a video
    seed: Seed = 2018
    # looks that videos have in turn, which no label tells: plain, noise, snow, pan
    domains: tuple[str, ...] = ("plain",)
    speed: Positive = 1.0  # factor on how fast things move
    # motions that no label names: their test videos are probed for retrieval instead
    unnamed: Natural = 0


@dataclass(frozen=True)
class View:
    """How a video becomes the clips that networks see."""

    size: Size = 24  # videos are resized to a square of this side, in pixels
    frames: Several = 24  # frames kept of each video, spread evenly over it
    # frames a second kept of each video, by time stamps: ``frames`` of each window; 0: spread
    # evenly, however long the video is (docs/time.md)
    fps: Weight = 0.0
    windows: Count = 1  # with fps: so many windows of each video, spread evenly over it
    length: Several = 8  # frames of a clip
    stride: Count = 2  # kept frames from one frame of a clip to the next
    # clips of a video, spread evenly over it, over which reading out and testing average
    clips: Count = 3


@dataclass(frozen=True)
class Schedule:
    """One training: AdamW, linear warm-up, then a cosine to zero; and how to compute it."""

    epochs: Count
    batch: Several = 64  # clips of a step, those of all processes together
    lr: Positive = 3e-3
    weight_decay: Weight = 1e-3
    # least steps of an epoch: sixty videos are not learned in one step an epoch
    min_steps: Count = 5
    warmup: Share = 0.1  # share of the training over which the learning rate rises
    clip: Weight = 0.0  # largest norm of a step's gradient; 0: any
    # the result is a moving average of the weights with this decay; 0: the last weights
    ema: Decay = 0.0
    # parts of a batch computed in turn, which takes less memory; graph losses see one at a time
    accumulate: Count = 1
    # of convolutions and matrix products, where lower than float32; graph losses keep float32
    precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False  # compile the backbones; pays on GPUs


@dataclass(frozen=True)
class Teachers:
    """Pre-training and fitting of the teachers."""

    # pretext tasks, one teacher each; MODULE:NAME: a task or a network of your own (docs/own.md);
    # TASK@HOME: trained on videos of its own, of a domain of the embedded data, or of a folder or
    # list with the same classes
    tasks: tuple[str, ...] = ("order", "coherence", "registration", "prediction")
    # each teacher sees time at its own scale: kept frames from one frame of a clip to the next
    strides: tuple[Count, ...] = (2, 2, 1, 2)
    backbone: str = "tiny16m"  # network of the teachers
    # training on the pretext task
    pretrain: Schedule = Schedule(epochs=10, batch=32, min_steps=20)
    fit: Schedule = Schedule(epochs=32, batch=16, lr=5e-3)  # fitting on the labelled part
    # cross-fitting folds: a labelled clip is judged by a teacher that has not seen its label
    folds: Several = 3
    home_labelled: Several = 12  # labelled videos per class of a home in the embedded data
    home_unlabelled: Natural = 30  # unlabelled videos per class of such a home
    # a control: two more teachers, one that says the same of every clip and one that says the next
    # class of what the last teacher says
    impostors: bool = False


@dataclass(frozen=True)
class Edges:
    """How edge weights are learned from evidence about the teachers."""

    # temperature of the closed form over teachers, in units of the mean ground cost
    eta: Positive = 0.2
    eta_pairs: Positive = 0.1  # temperature over pairs of teachers, in units of CKA
    floor: Share = 0.05  # share of the weight spread evenly, so that every teacher stays heard
    refreshes: Count = 8  # moments of a training at which the weights are learned anew
    gate_steps: Natural = 10  # steps of the gate between two moments
    # how much the gate is held to its prior, what the labels say of each teacher on average
    rho: Weight = 1.0
    alpha: Share = 0.5  # share of the label-based term in a labelled clip's evidence
    # routing: evidence is averaged over so many components of the teachers' joint feature space; 0:
    # clip by clip, by the gate
    components: Natural = 0


@dataclass(frozen=True)
class Distillation:
    """Training of the student through the graphs."""

    student: str = "tiny8n"  # as teachers.backbone; or light-2xs, -xs, -s, -m, -l and more
    schedule: Schedule = Schedule(epochs=24, batch=32, lr=1e-2, min_steps=20)
    # labelled clips a step, beside schedule.batch clips of the whole training part
    labelled_batch: Count = 8
    # students learn what teachers say of a video on average, or of the very clip
    target: Literal["video", "clip"] = "video"
    temperature: Positive = 1.0  # of the softmax of teachers and student
    eps: Positive = 0.3  # entropic regularisation, relative to the mean ground cost
    # share of the 0/1 cost in the ground cost: with none, confusing alike classes is cheap
    cost_shrink: Share = 0.5
    beta: Weight = 1.0  # weight of the consensus in the logits graph
    # gradient norm of the logits graph relative to that of the cross-entropy
    logits_scale: Weight = 1.0
    # gradient norm of the representation graph relative to that of the cross-entropy
    representation_scale: Weight = 1.0
    # between the teachers' pair vertices and the student's
    distance: Literal["mmd", "cka", "coral"] = "mmd"
    edges: Edges = Edges()  # how edge weights are learned from evidence about the teachers


@dataclass(frozen=True)
class Profile:
    """A whole run."""

    motion: MotionData = MotionData()  # the embedded data; unused with --data
    view: View = View()
    # decoded videos are kept as raw pixels (fastest), or small H.264 files (a thirtieth)
    storage: Literal["memmap", "transcode"] = "memmap"
    teachers: Teachers = Teachers()  # pre-training and fitting of the teachers
    distillation: Distillation = Distillation()  # training of the student through the graphs
    seeds: tuple[Seed, ...] = (0, 1, 2)  # all is trained once a seed
    methods: tuple[str, ...] = METHODS  # students, one each; MODULE:NAME: a method of your own

    def view_of(self, task: str) -> View:
        """The teacher's own view."""
        return replace(self.view, stride=self.teachers.strides[self.teachers.tasks.index(task)])


def _profiles() -> dict[str, Profile]:
    smoke = Profile()
    # A laptop's twenty minutes: longer training, and plain distillation from every teacher.
    longer = replace(smoke.teachers, pretrain=replace(smoke.teachers.pretrain, epochs=20))
    more = replace(smoke.distillation.schedule, epochs=40)
    workshop = Profile(
        teachers=longer,
        distillation=Distillation(schedule=more, labelled_batch=16),
        methods=(*METHODS, *(f"kd-{task}" for task in longer.tasks)),
    )
    long = Schedule(200, 64, lr=1e-3, weight_decay=0.05, clip=1.0, precision="bf16")
    fit, student = replace(long, epochs=60, batch=32, lr=5e-4), replace(long, lr=2e-3)
    paper = Profile(
        view=View(size=112, frames=64, length=16, stride=2),
        teachers=Teachers(backbone="r3d_18", pretrain=long, fit=fit),
        distillation=Distillation(
            "tiny32n", replace(student, weight_decay=0.02), labelled_batch=16
        ),
    )
    # Four networks, each at home in one look of videos; the student's are of all four.
    specialists = Profile(
        motion=MotionData(test=48, size=24, domains=("plain", "noise", "snow", "pan"), speed=1.6),
        teachers=Teachers(
            tasks=("registration@plain", "contrast@noise", "prediction@snow", "registration@pan"),
            strides=(1, 2, 2, 1),
            pretrain=Schedule(epochs=16, batch=32, min_steps=20),
        ),
        distillation=Distillation("tiny8m", temperature=0.5, edges=Edges(components=16)),
        seeds=(0,),
    )
    # Motions that no label names: where the representation graph must show its worth.
    unnamed = replace(
        smoke,
        motion=MotionData(unnamed=4),
        distillation=replace(smoke.distillation, representation_scale=2.0),
        seeds=(0,),
    )
    return {
        "specialists": specialists,
        "unnamed": unnamed,
        "smoke": smoke,
        "workshop": workshop,
        "paper": paper,
    }


PROFILES = _profiles()

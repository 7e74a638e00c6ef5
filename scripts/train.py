#!/usr/bin/env python3
"""Train a network on handwritten digits, data-parallel, with the optimizer in the store.

    python scripts/train.py --kv-store local
    mpirun -np 4 python scripts/train.py --plot curve.png --weights digits.safetensors
    mpirun -np 4 python scripts/train.py --checkpoint run --resume
    mpirun --with-ft ulfm -np 4 python scripts/train.py --elastic
    mpirun -np 16 python scripts/train.py --kv-store dist_device_sync     # a GPU a rank

Rules of the file:

- `fit` holds all of kvcoll that a training needs: init, set_optimizer, push, pull.
- Every rank makes the same calls of the store; only printing and files are rank 0's alone.
- A rank pushes the sum over its share of a batch, not the mean: the sum over the ranks is then
  the sum over the batch, and any number of ranks trains along the same curve.
- `kv` holds the parameters and updates them. `sums` has no updater: what is pushed to it comes
  back as the sum over the ranks, which serves for losses, hits and digests; it is on the host.
- Samples and parameters lie on this rank's GPU, if the store is on GPUs; the code is the same.

Exit codes: 0 done; 1 the target accuracy is missed, or replicas differ; 2 a wrong option or
file; 75 stopped by a signal, with a checkpoint to go on from.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, NoReturn

# The ranks of a host share its cores: were each BLAS to take them all, a run would be 20 times
# slower. It is read once, when NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import train_arrays
import train_checkpoint
import train_elastic
from numpy.typing import NDArray

import kvcoll

try:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ModuleNotFoundError as error:
    sys.exit(
        f"train.py: there is no module '{error.name}': pip install '.[train]' in kvcoll's folder"
    )

Floats = NDArray[np.float32]
Params = dict[str, Floats]
LEARNING_RATES = {
    "sgd": 0.05, "nag": 0.05, "adam": 0.002, "adamw": 0.002, "adamax": 0.005, "nadam": 0.002,
    "lamb": 0.005, "lars": 1.0, "rmsprop": 0.0005, "adagrad": 0.02, "adadelta": 1.0, "ftrl": 0.05,
    "signum": 0.001,
}  # fmt: skip
WITH_MOMENTUM = ("sgd", "nag", "lars")


class Samples(NamedTuple):
    """Images, one a row, and the digit that each of them shows, also as a row of 0 and 1."""

    pixels: Floats
    digits: NDArray[np.int64]
    targets: Floats


@dataclasses.dataclass(frozen=True)
class Epoch:
    """Where the training stands after an epoch; epoch 0 is before the first step.

    Of `train_s`, `store_s` were spent in push and pull, waiting for slower ranks included.
    """

    number: int
    loss: float
    accuracy: float
    train_s: float = 0.0
    store_s: float = 0.0


# The run


def main() -> int:
    """Run the command line; return the exit code, which is the same on every rank."""
    args = parse_args()
    with (
        train_checkpoint.Stop(args) as stop,
        kvcoll.create(args.kv_store, overlap=args.overlap, elastic=args.elastic) as kv,
        kvcoll.create(train_arrays.beside(args.kv_store), elastic=args.elastic) as sums,
    ):
        return run(args, kv, sums, stop, train_arrays.arrays_for(args.kv_store, kv.local_rank))


def run(
    args: argparse.Namespace,
    kv: kvcoll.KVStore,
    sums: kvcoll.KVStore,
    stop: train_checkpoint.Stop,
    arrays: train_arrays.Arrays,
) -> int:
    """Train, report, prove that all replicas are the same bits, and write the files."""
    train, test = load_samples()
    params = init_params([train.pixels.shape[1], *args.hidden, 10], args.seed)
    stop_all_if(sums, problem_with_files(args, params) if kv.rank == 0 else "")

    say(kv, describe_run(args, kv, params, train, test))
    epochs: list[Epoch] = []
    here = {name: arrays.put(value) for name, value in params.items()}
    train, test = (Samples(*map(arrays.put, samples)) for samples in (train, test))
    steps = fit(args, kv, sums, stop, here, train, test, arrays)
    for epoch in with_progress_bar(args, kv, steps):
        epochs[epoch.number :] = [epoch]  # once more, if a rank was lost at its end
        if epoch.number % math.ceil(args.epochs / 20) == 0 or epoch.number == args.epochs:
            say(kv, describe_epoch(epoch, len(train.digits)))
    if stop.agreed:
        say(kv, stop.describe(args))
        return train_checkpoint.STOPPED
    say(kv, describe_end(args, epochs, len(train.digits)))

    params = {name: arrays.at_host(value) for name, value in here.items()}
    digests = gather(sums, "digests", digest(params))
    same = int((digests == digests[0]).all(axis=1).sum())
    shown = digests[0].tobytes()[:8].hex()
    say(kv, f"replicas: {same} of {kv.num_workers} the same bits (blake2b {shown})")
    if kv.rank == 0:
        write_files(args, kv, params, epochs)
    return 0 if same == kv.num_workers and epochs[-1].accuracy >= args.target_accuracy else 1


def fit(
    args: argparse.Namespace,
    kv: kvcoll.KVStore,
    sums: kvcoll.KVStore,
    stop: train_checkpoint.Stop,
    params: Params,
    train: Samples,
    test: Samples,
    arrays: train_arrays.Arrays,
) -> Iterator[Epoch]:
    """Train `params` in place; yield where it stands before the first epoch and after each.

    Once the ranks agree to stop, it saves and ends.
    """
    names, values = list(params), list(params.values())
    kv.init(names, values)
    kv.set_optimizer(create_optimizer(args))
    if args.compression != "none":
        kv.set_gradient_compression(compression(args))
    so_far = train_checkpoint.resume(args, kv)
    epochs = [Epoch(**epoch) for epoch in so_far.epochs]
    kv.pull(names, out=values)  # from here on rank 0's values on every rank

    sums.init("score", np.zeros(2))
    train_elastic.prepare(args, sums)
    epochs = epochs or [Epoch(0, *score(sums, params, train, test))]
    yield from epochs
    so_far.epochs = [dataclasses.asdict(epoch) for epoch in epochs]
    while len(so_far.epochs) <= args.epochs:
        try:
            epoch = train_epoch(args, kv, sums, stop, params, train, test, so_far, arrays)
            if epoch is None:
                return
            so_far = train_checkpoint.Progress([*so_far.epochs, dataclasses.asdict(epoch)])
            train_checkpoint.save(args, kv, so_far, wait=False)
        except kvcoll.errors.RankLostError as error:
            if not args.elastic:
                raise
            done = train_elastic.go_on(kv, sums, len(so_far.epochs), error)
            so_far = train_checkpoint.Progress(so_far.epochs[:done])
        else:
            yield epoch


def train_epoch(
    args: argparse.Namespace,
    kv: kvcoll.KVStore,
    sums: kvcoll.KVStore,
    stop: train_checkpoint.Stop,
    params: Params,
    train: Samples,
    test: Samples,
    so_far: train_checkpoint.Progress,
    arrays: train_arrays.Arrays,
) -> Epoch | None:
    """Train from the store's version to the end of the epoch; return where it stands then.

    None if the ranks have agreed to stop before, and have saved.
    """
    names, values = list(params), list(params.values())
    number, batches = len(so_far.epochs), math.ceil(len(train.digits) / args.batch_size)
    kv.pull(names, out=values)
    started_s = perf_counter() - so_far.train_s
    order = list(shuffled_batches(len(train.digits), args.batch_size, (args.seed, number)))
    while kv.version < number * batches:
        share = arrays.put(order[kv.version % batches][kv.rank :: kv.num_workers])
        gradients = backward(params, train.pixels[share], train.targets[share])
        pushed_s = perf_counter()
        kv.push(names, [gradients[name] for name in names])
        kv.pull(names, out=values)
        so_far.store_s += perf_counter() - pushed_s
        so_far.steps = kv.version - (number - 1) * batches
        if stop.agree(kv, so_far.steps):
            so_far.train_s = perf_counter() - started_s
            train_checkpoint.save(args, kv, so_far, wait=True)
            return None
    kv.barrier()  # where pushes are late, they are applied now
    kv.pull(names, out=values)
    arrays.finish()
    train_s = perf_counter() - started_s
    return Epoch(number, *score(sums, params, train, test), train_s, so_far.store_s)


def create_optimizer(args: argparse.Namespace) -> kvcoll.optimizer.Optimizer:
    """Return the optimizer; the store gives it sums over the global batch, it wants means."""
    rule = {"learning_rate": args.lr, "wd": args.wd, "rescale_grad": 1 / args.batch_size}
    if args.optimizer in WITH_MOMENTUM:
        rule["momentum"] = args.momentum
    if args.optimizer == "ftrl":  # its own defaults are for gradients that are not means
        rule |= {"beta": 0.01, "lamda1": 1e-4}
    return kvcoll.optimizer.create(args.optimizer, **rule)


def compression(args: argparse.Namespace) -> dict[str, object]:
    """Return how gradients travel."""
    threshold = {"threshold": args.threshold} if args.compression in ("2bit", "1bit") else {}
    return {"type": args.compression, **threshold}


def score(
    sums: kvcoll.KVStore, params: Params, train: Samples, test: Samples
) -> tuple[float, float]:
    """Return the training loss and the test accuracy; each rank looks at its share of both."""
    mine = slice(sums.rank, None, sums.num_workers)
    log_p = log_softmax(forward(params, train.pixels[mine])[-1])
    loss = -(log_p * train.targets[mine]).sum(dtype=np.float64)
    hits = forward(params, test.pixels[mine])[-1].argmax(axis=1) == test.digits[mine]
    totals = np.array([float(loss), float(hits.sum())])
    sums.pushpull("score", totals)
    return float(totals[0]) / len(train.digits), float(totals[1]) / len(test.digits)


def gather(sums: kvcoll.KVStore, key: str, row: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return every rank's row: each fills its own among zeros, and the store adds them."""
    rows = np.zeros((sums.num_workers, len(row)), np.uint64)
    sums.init(key, rows)
    rows[sums.rank] = row
    sums.pushpull(key, rows)
    return rows


def digest(params: Params) -> NDArray[np.uint64]:
    """Return BLAKE2b of all parameters, as 8 words."""
    state = hashlib.blake2b(b"".join(value.tobytes() for value in params.values()))
    return np.frombuffer(state.digest(), np.uint64)


def stop_all_if(sums: kvcoll.KVStore, problem: str) -> None:
    """End every rank if one has a problem, so that none waits for one that has left."""
    if problem:
        print(f"train.py: error: {problem}", file=sys.stderr)
    if gather(sums, "problem", np.array([problem != ""], np.uint64)).any():
        sys.exit(2)


# The network: layers of relu(x @ weight + bias), the last without the relu


def load_samples() -> tuple[Samples, Samples]:
    """Return 1,438 samples to train with and 359 to test: the same ones whatever the seed."""
    pixels, digits = load_digits(return_X_y=True)
    test, train = np.split(np.random.default_rng(0).permutation(len(digits)), [len(digits) // 5])
    pixels = ((pixels - pixels[train].mean()) / pixels[train].std()).astype(np.float32)
    targets = train_arrays.one_hot(digits)
    own, others = (Samples(pixels[k], digits[k], targets[k]) for k in (train, test))
    return own, others


def shuffled_batches(
    samples: int, batch_size: int, seed: tuple[int, int]
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each global batch, in an order that all ranks share."""
    order = np.random.default_rng(seed).permutation(samples)
    for start in range(0, samples, batch_size):
        yield order[start : start + batch_size]


def init_params(sizes: list[int], seed: int) -> Params:
    """Return He-normal weights and zero biases of a network with layers of these sizes."""
    rng = np.random.default_rng(seed)
    params = {}
    for layer in range(1, len(sizes)):
        n_in, n_out = sizes[layer - 1], sizes[layer]
        weight = rng.normal(scale=math.sqrt(2 / n_in), size=(n_in, n_out))
        params[f"layer{layer}_weight"] = weight.astype(np.float32)
        params[f"layer{layer}_bias"] = np.zeros(n_out, np.float32)
    return params


def forward(params: Params, pixels: Floats) -> list[Floats]:
    """Return what goes into every layer, and at the end the logits."""
    depth, flow = len(params) // 2, [pixels]
    for layer in range(1, depth + 1):
        x = flow[-1] @ params[f"layer{layer}_weight"] + params[f"layer{layer}_bias"]
        flow.append(np.maximum(x, 0) if layer < depth else x)
    return flow


def backward(params: Params, pixels: Floats, targets: Floats) -> Params:
    """Return the gradients of the summed cross-entropy: zeros if there are no samples."""
    flow = forward(params, pixels)
    delta = np.exp(log_softmax(flow[-1])) - targets
    gradients = {}
    for layer in range(len(params) // 2, 0, -1):
        gradients[f"layer{layer}_weight"] = flow[layer - 1].T @ delta
        gradients[f"layer{layer}_bias"] = delta.sum(axis=0)
        delta = (delta @ params[f"layer{layer}_weight"].T) * (flow[layer - 1] > 0)
    return gradients


def log_softmax(logits: Floats) -> Floats:
    """Return the logarithm of each row's softmax, safe for large logits."""
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


# What rank 0 says


def say(kv: kvcoll.KVStore, text: str) -> None:
    """Print on rank 0, above its progress bar, at once: mpirun makes stdout a buffered pipe."""
    if kv.rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def with_progress_bar(
    args: argparse.Namespace, kv: kvcoll.KVStore, epochs: Iterator[Epoch]
) -> Iterator[Epoch]:
    """Pass the epochs on, under a bar on rank 0's terminal."""
    # Under Open MPI stdout is a terminal even where mpirun's is none, but stderr is not. What
    # mpirun's own is, only the script that starts it knows.
    is_terminal = sys.stdout.isatty() and sys.stderr.isatty()
    is_terminal = is_terminal or os.environ.get("KVCOLL_TERMINAL") == "1"
    wanted = args.progress == "bar" or (args.progress == "auto" and is_terminal)
    form = "training  {bar:36} {percentage:3.0f} %, {elapsed} gone, {remaining} to go"
    return iter(
        tqdm(
            epochs,
            total=args.epochs + 1,
            file=sys.stdout,  # where the lines go too, so that mpirun keeps their order
            ncols=78,
            nrows=24,  # both given, since a terminal seen through mpirun has no size
            bar_format=form,
            leave=False,
            disable=not wanted or kv.rank != 0,
        )
    )


def describe_run(
    args: argparse.Namespace, kv: kvcoll.KVStore, params: Params, train: Samples, test: Samples
) -> str:
    """Return the lines above the table, and its head."""
    shape = "-".join(map(str, [train.pixels.shape[1], *args.hidden, 10]))
    size = sum(value.size for value in params.values())
    momentum = f"momentum {args.momentum:g}, " if args.optimizer in WITH_MOMENTUM else ""
    codes = f", {args.compression} gradients" if args.compression != "none" else ""
    return (
        f"store     {kv.type}, {count(kv.num_workers, 'rank')} on {count(kv.num_hosts, 'host')}\n"
        f"data      {len(train.digits):,} handwritten digits to train, {len(test.digits)} to test\n"
        f"network   {shape}, {size:,} parameters in {len(params)} keys\n"
        f"training  {args.optimizer}, learning rate {args.lr:g}, {momentum}"
        f"weight decay {args.wd:g}, global batch {args.batch_size}, seed {args.seed}{codes}\n\n"
        "epoch  train loss  test accuracy  samples/s  in store"
    )


def describe_epoch(epoch: Epoch, samples: int) -> str:
    """Return one line of the table."""
    line = f"{epoch.number:5}  {epoch.loss:10.4f}  {100 * epoch.accuracy:11.1f} %"
    if epoch.number:
        line += f"  {samples / epoch.train_s:9,.0f}  {100 * epoch.store_s / epoch.train_s:6.0f} %"
    return line


def describe_end(args: argparse.Namespace, epochs: list[Epoch], samples: int) -> str:
    """Return the summary, and a missed target."""
    train_s, store_s = sum(e.train_s for e in epochs), sum(e.store_s for e in epochs)
    accuracy = epochs[-1].accuracy
    missed = f"\nmissed: test accuracy is below the target of {100 * args.target_accuracy:g} %"
    return (
        f"\ntrained {count(args.epochs, 'epoch')} in {train_s:.2f} s: "
        f"test accuracy {100 * accuracy:.1f} %, {args.epochs * samples / train_s:,.0f} samples/s, "
        f"{100 * store_s / train_s:.0f} % of the time in the store"
        f"{missed if accuracy < args.target_accuracy else ''}"
    )


def count(number: int, thing: str) -> str:
    """Write `1 rank`, `2 ranks`."""
    return f"{number} {thing}" + ("" if number == 1 else "s")


# What rank 0 reads and writes


def problem_with_files(args: argparse.Namespace, params: Params) -> str:
    """Read the weights to start from into `params`; return what is wrong with a file, or ''."""
    for path in filter(None, (args.weights, args.json, args.plot)):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            return f"cannot write {path}: it is a folder, or its folder is missing or read-only"
    if args.start_from is None:
        return ""
    try:
        saved = load_file(args.start_from)
    except (OSError, SafetensorError) as error:
        return f"cannot start from {args.start_from}: {error}"
    expected, got = layout(params), layout(saved)
    for name in sorted(expected.keys() | got.keys()):
        want, have = expected.get(name, "no such key"), got.get(name, "no such key")
        if want != have:
            cure = "give the --hidden that it was trained with"
            return (
                f"cannot start from {args.start_from}: {name}: expected {want}, got {have}: {cure}"
            )
    for name, value in saved.items():
        params[name][...] = value
    return ""


def layout(params: Params) -> dict[str, str]:
    """Return each parameter's dtype and shape: `float32[64, 128]`."""
    return {name: f"{value.dtype}{list(value.shape)}" for name, value in params.items()}


def write_files(
    args: argparse.Namespace, kv: kvcoll.KVStore, params: Params, epochs: list[Epoch]
) -> None:
    """Write the weights, the numbers and the picture that were asked for."""
    if args.weights:
        partial = args.weights.with_name(args.weights.name + ".partial")
        save_file(params, partial)
        os.replace(partial, args.weights)
    if args.json:
        about = {"kv_store": kv.type, "ranks": kv.num_workers, "hosts": kv.num_hosts}
        curve = [dataclasses.asdict(epoch) for epoch in epochs]
        args.json.write_text(json.dumps({**about, "epochs": curve}, indent=1) + "\n")
    if args.plot:
        draw(args.plot, f"{args.optimizer}, {kv.type}, {count(kv.num_workers, 'rank')}", epochs)
    for path in filter(None, (args.weights, args.json, args.plot)):
        say(kv, f"wrote {path}")


def draw(path: Path, subtitle: str, epochs: list[Epoch]) -> None:
    """Draw the loss above the accuracy, over the epochs."""
    from matplotlib.figure import Figure  # here, because it is slow to import
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.number for epoch in epochs]
    figure = Figure(figsize=(7, 5.5), dpi=150, layout="constrained")
    figure.suptitle(f"Training on handwritten digits ({subtitle})")
    above, below = figure.subplots(2, sharex=True)
    above.semilogy(numbers, [epoch.loss for epoch in epochs], color="#2563eb", marker=".")
    above.set_ylabel("training loss (nats)")
    below.plot(numbers, [100 * epoch.accuracy for epoch in epochs], color="#ea580c", marker=".")
    below.set_ylabel("test accuracy (%)")
    below.set_ylim(0, 103)
    below.set_xlabel("epoch")
    below.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for axes in (above, below):
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels()
    figure.savefig(path, format="png")


# The command line


class Parser(argparse.ArgumentParser):
    """Reports a wrong option once, though every rank of the job finds it."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2; silently with 0 where the launcher says that this is not rank 0."""
        # The environment is asked because there is no store yet; a job ends with its worst code.
        if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")) != "0":
            sys.exit(0)
        super().error(message)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=str(__doc__).partition("\n")[0],
        epilog="Each rank takes its share of every batch; rank 0 prints, reads and writes.",
    )
    add_training_options(parser)
    add = parser.add_argument
    add(
        "--progress",
        default="auto",
        choices=["auto", "bar", "lines"],
        help="auto: a bar on a terminal; bar: also where mpirun hides the terminal",
    )
    train_checkpoint.add_options(parser)
    train_elastic.add_options(parser)
    add("--start-from", type=Path, metavar="FILE", help="start from these weights")
    add("--weights", type=Path, metavar="FILE", help="write the weights, as safetensors")
    add("--json", type=Path, metavar="FILE", help="write the numbers of every epoch")
    add("--plot", type=Path, metavar="FILE", help="draw loss and accuracy, as PNG")
    args = parser.parse_args()
    if args.resume and args.checkpoint is None:
        parser.error("--resume goes with --checkpoint DIR")
    args.lr = LEARNING_RATES[args.optimizer] if args.lr is None else args.lr
    return args


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what changes the training itself."""
    add, default = parser.add_argument, "(default: %(default)s)"
    rates = ", ".join(f"{rate} for {name}" for name, rate in LEARNING_RATES.items())
    add(
        "--kv-store",
        default="dist_sync",
        metavar="TYPE",
        help="type of the store; local needs neither mpirun nor MPI; dist_device_sync, and nccl "
        f"without mpirun, train on GPUs {default}",
    )
    add(
        "--epochs",
        type=at_least(1),
        default=20,
        metavar="N",
        help=f"passes over the training set {default}",
    )
    add(
        "--batch-size",
        type=at_least(1),
        default=64,
        metavar="N",
        help=f"samples a step, of all ranks together {default}",
    )
    add(
        "--hidden",
        type=at_least(1),
        default=[256, 128],
        nargs="+",
        metavar="N",
        help="sizes of the hidden layers (default: 256 128)",
    )
    add(
        "--optimizer",
        default="sgd",
        choices=list(LEARNING_RATES),
        help=f"the rule by which the store updates the parameters {default}",
    )
    add("--lr", type=float, metavar="X", help=f"learning rate (default: {rates})")
    add(
        "--momentum",
        type=float,
        default=0.9,
        metavar="X",
        help=f"of {', '.join(WITH_MOMENTUM)} only {default}",
    )
    add(
        "--compression",
        default="none",
        choices=["none", "2bit", "1bit", "fp16", "bf16"],
        help=f"how gradients travel {default}",
    )
    add(
        "--threshold",
        type=float,
        default=0.5,
        metavar="X",
        help=f"of 2bit and 1bit compression {default}",
    )
    add("--overlap", action="store_true", help="across hosts, sum while computing goes on")
    add("--wd", type=float, default=1e-4, metavar="X", help=f"weight decay {default}")
    add(
        "--seed",
        type=at_least(0),
        default=1,
        metavar="N",
        help=f"of the first weights and the order of the samples {default}",
    )
    add(
        "--target-accuracy",
        type=float,
        default=0.95,
        metavar="X",
        help=f"below this test accuracy the exit code is 1; 0 turns it off {default}",
    )


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` on."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number >= {least}, got {text!r}")
        return int(text)

    return read


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (kvcoll.errors.MissingDependencyError, kvcoll.errors.LaunchError) as error:
        sys.exit(f"train.py: error: {error}")  # the user's to mend, and no line of this program

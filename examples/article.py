"""Every claim of the article on 1x1 convolution, with numbers from this machine: stock torch beside conv1x1_ext.

Run: python examples/article.py. Ends with a failing status where a claim or an equality does not hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from common import check, check_close, duration, machine, make_console, median_times
from rich.table import Table
from torch import Tensor, nn

from conv1x1_ext import Conv1x1, Conv1x1Act, Conv1x1AvgPool

ARTICLE_RATIO = 23  # "approximately 23 times faster than ... with a (3, 3) filter"
console = make_console()
sections: dict[str, float] = {}
speedups: list[tuple[str, str, float, float]] = []  # section, what, stock's seconds, ours


@contextmanager
def section(title: str) -> Iterator[None]:
    """Prints a heading and keeps the time that the section takes."""
    console.rule(f"[bold]{title}", align="left")
    start = time.perf_counter()
    yield
    sections[title] = time.perf_counter() - start
    console.print()


def parameters(module: nn.Module) -> int:
    """Number of parameters, weights and biases together."""
    return sum(p.numel() for p in module.parameters())


def step(
    function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module, seed: Tensor | None = None
) -> Callable[[], tuple[Tensor, ...]]:
    """A function that runs forward and backward: gradients of x and of the module's parameters.

    Args:
        function: what to differentiate.
        x: its input.
        module: holds the parameters.
        seed: the gradient of the output; random by default.
    """
    leaves = [x.detach().requires_grad_(), *module.parameters()]
    if seed is None:
        with torch.no_grad():
            seed = torch.randn_like(function(x))
    return lambda: torch.autograd.grad(function(leaves[0]), leaves, seed)


def compare(title: str, what: str, stock: Callable[[], object], ours: Callable[[], object]) -> None:
    """Times both in turns, prints a line and keeps it for the closing table."""
    stock_time, our_time = median_times([stock, ours])
    speedups.append((title, what, stock_time, our_time))
    console.print(f"{what}: stock {duration(stock_time)}, ours {duration(our_time)}, {stock_time / our_time:.2f}x")


def weighting(title: str) -> None:
    """The article's picture: one filter of value 4 weights every pixel by 4."""
    image = torch.arange(16.0).view(1, 4, 4)
    conv = Conv1x1(1, 1, bias=False)
    with torch.no_grad():
        conv.weight.fill_(4.0)
        output = conv(image)
    check(torch.equal(output, 4 * image), "a filter of value 4 gives 4 times the input, exactly")
    check(torch.equal(output, F.conv2d(image, conv.weight)), "the same as stock torch, exactly")
    pixel = torch.zeros(1, 4, 4)
    pixel[0, 1, 2] = 1.0
    with torch.no_grad():
        check(torch.equal(conv(pixel), 4 * pixel), "no neighbouring pixel takes part")
    table = Table("input", "filter", "output", title="Pixel-wise weighting", title_justify="left")
    rows = [
        (" ".join(f"{v:3.0f}" for v in a), " ".join(f"{v:3.0f}" for v in b))
        for a, b in zip(image[0], output[0], strict=True)
    ]
    for i, (before, after) in enumerate(rows):
        table.add_row(before, "[4]" if i == 0 else "", after)
    console.print(table)


def reduction(title: str) -> None:
    """512 feature maps become 32; parameters against a 3x3."""
    maps = torch.ones((512, 12, 12))
    stock = nn.Conv2d(512, 32, 1)
    wide = nn.Conv2d(512, 32, 3)
    ours = Conv1x1.from_conv2d(stock)
    with torch.no_grad():
        check(tuple(ours(maps).shape) == (32, 12, 12), "(512, 12, 12) becomes (32, 12, 12)")
        on_ones = check_close(ours(maps), stock(maps), "512 -> 32 on ones is nn.Conv2d's")
        random = torch.randn(512, 12, 12)
        on_noise = check_close(ours(random), stock(random), "512 -> 32 on noise is nn.Conv2d's")
        # "channel-wise pooling": every output pixel is a weighted sum over the channels of one input pixel.
        pooled = torch.einsum("oc,chw->ohw", stock.weight.flatten(1), random) + stock.bias.view(-1, 1, 1)  # type: ignore[union-attr]
        check_close(ours(random), pooled, "a 1x1 convolution is a weighted sum across channels")
    check(parameters(ours) == 16_416, "a 1x1 from 512 to 32 has 16,416 parameters")
    check(parameters(wide) == 147_488, "a 3x3 from 512 to 32 has 147,488 parameters")
    table = Table("layer", "output", "parameters", "relative error against nn.Conv2d", title_justify="left")
    table.add_row("nn.Conv2d(512, 32, 1)", "(32, 12, 12)", f"{parameters(stock):,}", "")
    table.add_row(
        "Conv1x1(512, 32)", "(32, 12, 12)", f"{parameters(ours):,}", f"{on_ones:.1e} ones, {on_noise:.1e} noise"
    )
    table.add_row("nn.Conv2d(512, 32, 3)", "(32, 10, 10)", f"{parameters(wide):,}", "")
    console.print(table)
    with torch.no_grad():
        compare(title, "512 -> 32, forward", lambda: stock(maps), lambda: ours(maps))
    compare(title, "512 -> 32, forward + backward", step(stock, maps, stock), step(ours, maps, ours))


def three_by_three(title: str) -> None:
    """How many times longer a 3x3 takes than a 1x1: the article says about 23, its arithmetic 9."""
    maps = torch.ones((512, 12, 12))
    stock, wide = nn.Conv2d(512, 32, 1), nn.Conv2d(512, 32, 3, padding=1)  # padded: both make (32, 12, 12)
    ours = Conv1x1.from_conv2d(stock)
    table = Table("threads", "3x3 stock", "1x1 stock", "1x1 ours", "3x3 / 1x1 stock", "3x3 stock / 1x1 ours", "article")
    default = torch.get_num_threads()
    for threads in sorted({1, default}):
        torch.set_num_threads(threads)
        with torch.no_grad():
            times = median_times([lambda: wide(maps), lambda: stock(maps), lambda: ours(maps)], seconds=1.5)
        if not (times[0] > times[1] and times[0] > times[2]):  # no failure: results are checked, not this machine
            console.print(f"With {threads} threads a 1x1 took longer than a 3x3 here. Was the machine busy?")
        ratios = [f"{times[0] / t:.1f}" for t in times[1:]]
        table.add_row(str(threads), *map(duration, times), *ratios, f"about {ARTICLE_RATIO}")
        speedups.append((title, f"1x1, forward, {threads} thread{'s' * (threads > 1)}", times[1], times[2]))
    torch.set_num_threads(default)
    console.print(table)
    console.print("A 3x3 does 9 times the arithmetic of a 1x1; what differs from 9 is how well each kernel does it.")


class ConvNet(nn.Module):
    """The article's network."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            # layer 1
            nn.Conv2d(1, 3, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            # layer 2
            nn.Conv2d(3, 8, 3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            # layer 3
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),  # additional non-linearity
        )

    def forward(self, x: Tensor) -> Tensor:
        """Any multiple of 28 x 28 pixels to (N, 8, 7, 7)."""
        output: Tensor = self.network(x.view(-1, 1, 28, 28))
        return output


class FusedConvNet(ConvNet):
    """The same network with layer 3 as ``Conv1x1Act(8, 8, activation="relu")``, sharing another one's parameters."""

    def __init__(self, stock: ConvNet) -> None:
        super().__init__()
        fused = Conv1x1Act.from_conv2d(stock.network[6], activation="relu")  # type: ignore[arg-type]
        self.network = nn.Sequential(*list(stock.network)[:6], fused)


def non_linearity(title: str) -> None:
    """A 1x1 that keeps the number of channels, for the ReLU behind it; then the article's ConvNet."""
    maps = torch.randn(512, 12, 12)
    conv = nn.Conv2d(512, 512, 1, bias=False)
    linear, relu = Conv1x1.from_conv2d(conv), Conv1x1Act.from_conv2d(conv, activation="relu")
    with torch.no_grad():
        check(relu(maps).shape == maps.shape, "512 -> 512 keeps (512, 12, 12)")
        check_close(relu(maps), F.relu(conv(maps)), "512 -> 512 with ReLU is nn.Conv2d's and ReLU's")
        straight, bent = (((f(maps) + f(-maps)).norm() / f(maps).norm()).item() for f in (linear, relu))
        check(straight < 1e-5, "without ReLU the layer is linear: f(x) + f(-x) = 0")
        check(bent > 0.5, "with ReLU it is not: f(x) + f(-x) is far from 0")
        console.print(f"512 -> 512: |f(x) + f(-x)| / |f(x)| is {bent:.2f} with ReLU, {straight:.0e} without: linear")
        compare(title, "512 -> 512 + ReLU, forward", lambda: F.relu(conv(maps)), lambda: relu(maps))
    compare(
        title,
        "512 -> 512 + ReLU, forward + backward",
        step(lambda x: F.relu(conv(x)), maps, conv),
        step(relu, maps, relu),
    )

    stock = ConvNet()
    ours = FusedConvNet(stock)
    console.print(ours.network[6])
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        check(p is q, f"{name} is shared, not copied")
    images = torch.rand(64, 28, 28)
    check(tuple(ours(images).shape) == (64, 8, 7, 7), "64 images give (64, 8, 7, 7)")
    error = check_close(ours(images), stock(images), "the ConvNet's output")
    seed = torch.randn(64, 8, 7, 7)
    names = ["input", *(name for name, _ in stock.named_parameters())]
    pairs = zip(names, step(ours, images, ours, seed)(), step(stock, images, stock, seed)(), strict=True)
    worst = max(check_close(a, b, f"the ConvNet's gradient of {name}") for name, a, b in pairs)
    console.print(
        f"ConvNet, {len(names)} gradients: relative error {error:.1e} of the output, at most {worst:.1e} of a gradient"
    )
    compare(title, "ConvNet, 64 images, forward + backward", step(stock, images, stock), step(ours, images, ours))


def linear_head(title: str) -> None:
    """10 classes without a linear layer: 1x1 convolution, ReLU, global average pooling."""
    batch, channels, side, classes = 16, 512, 12, 10
    maps = torch.randn(batch, channels, side, side)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(channels * side * side, classes))
    conv = nn.Conv2d(channels, classes, 1)
    ours = Conv1x1AvgPool.from_conv2d(conv, activation="relu")

    def stock(x: Tensor) -> Tensor:
        return F.relu(conv(x)).mean((-2, -1))

    error = check_close(ours(maps), stock(maps), "the head is conv + ReLU + mean")
    seed = torch.randn(batch, classes)
    for name, a, b in zip(
        ("input", "weight", "bias"), step(ours, maps, ours, seed)(), step(stock, maps, conv, seed)(), strict=True
    ):
        check_close(a, b, f"the head's gradient of {name}")
    check(tuple(ours(maps).shape) == tuple(linear(maps).shape) == (batch, classes), "both heads give (N, 10)")
    check(parameters(linear) == 737_290 and parameters(ours) == 5_130, "737,290 parameters against 5,130")
    with torch.no_grad():
        forward = median_times([lambda: linear(maps), lambda: stock(maps), lambda: ours(maps)])
    modules = ((linear, linear), (stock, conv), (ours, ours))
    both = median_times([step(function, maps, module) for function, module in modules])
    table = Table(
        "head", "parameters", "output", "forward", "forward + backward", title=f"({batch}, 512, 12, 12) to 10 classes"
    )
    for name, count, i in (
        ("Flatten + Linear", parameters(linear), 0),
        ("Conv2d + ReLU + mean", parameters(conv), 1),
        ("Conv1x1AvgPool", parameters(ours), 2),
    ):
        table.add_row(name, f"{count:,}", f"({batch}, {classes})", duration(forward[i]), duration(both[i]))
    console.print(table)
    console.print(f"Conv1x1AvgPool against Conv2d + ReLU + mean: relative error {error:.1e}; gradients equal too")
    for what, times in (("forward", forward), ("forward + backward", both)):
        speedups.append((title, f"against Conv2d + ReLU + mean, {what}", times[1], times[2]))
        speedups.append((title, f"against Flatten + Linear, {what}", times[0], times[2]))


def closing_table() -> None:
    """Where the time went, and the speedups."""
    table = Table(
        "section", "took", "measured", "stock", "ours", "speedup", title="Where the time went, and the speedups"
    )
    for title, seconds in sections.items():
        rows = [row for row in speedups if row[0] == title]
        table.add_row(title, duration(seconds), *(() if rows else ("", "", "", "")), style="bold")
        for _, what, stock, ours in rows:
            table.add_row("", "", what, duration(stock), duration(ours), f"{stock / ours:.2f}x")
    table.add_section()
    table.add_row("total", duration(sum(sections.values())), style="bold")
    console.print(table)


def main() -> None:
    """Runs the article from top to bottom."""
    torch.manual_seed(0)
    console.print(f"[bold]The article, claim by claim[/] on {machine()}\n")
    for title, run in (
        ("1. Pixel-wise weighting", weighting),
        ("2. Dimensionality reduction", reduction),
        ("3. 3x3 against 1x1", three_by_three),
        ("4. Additional non-linearity", non_linearity),
        ("5. No linear layers", linear_head),
    ):
        with section(title):
            run(title)
    closing_table()
    console.print("Every claim and every equality above was checked.")


if __name__ == "__main__":
    main()

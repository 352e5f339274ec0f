"""--ranks: what a step would take on 1 to 64 cards, from what is measured here and what is stated of links.

    python bench_mfu.py --ranks config/babylm.py                     --card_mfu=0.5 where a card is known to do that

Counted or measured here: parameters, FLOPs, and the seconds of a step of this machine. Stated, and measured by
nobody here: LINKS, a card's peak and --card_mfu. A step is its micro-steps, what is not hidden of sending the
gradients, and the optimizer, which every rank does whole, but with config/zero.py (zero_ms). They are sent as train.GradientSum does it, behind the
backward pass of the last micro-step, two thirds of that, but for the token table's; n ranks send 2 (n - 1) / n
times the gradients' bytes over the slowest link (a ring: Patarasuk 2009), each bucket after 2 log2 n delays; weights
that zero.py has moved are sent once, half of that.
"""
import math
from dataclasses import dataclass

import bench_mfu
import sample
import train
from bench_mfu import measured, text_table
from config import refuse
from config.bench_doll import card_peak

ranks: bool = False         # say what a step takes on 1 to 64 ranks

HOST = 8                    # cards of a machine
LAUNCH = 5e-3               # seconds that a host takes to start a micro-step: an estimate
OPTIMIZER = 2e-3            # and to start an optimizer's kernels, which take less: an estimate
NUMBERS = 1, 2, 4, 8, 16, 32, 64
COLUMNS = dict(what=None, ranks=0, micro_steps=0, fp32_ms=2, fp32_hidden='.0%', fp32_times=2, zero_ms=2, bf16_ms=2,
               bf16_hidden='.0%', bf16_times=2)


@dataclass
class Link:
    """What a card sends: bytes a second to its neighbour, and over its host's network, seconds of delay."""
    about: str
    inside: float
    outside: float
    delay: float


LINKS = {'RTX 4090': Link('PCIe without peer-to-peer 6 GB/s, 25 Gbit/s between hosts', 6e9, 3.1e9, 30e-6),
         'H100': Link('NVLink 360 GB/s, 8 x 400 Gbit/s between hosts', 360e9, 360e9, 10e-6)}


@dataclass
class Load:
    """A step: seconds of its gradients on one rank, rows, the most of a micro-step, bytes of all gradients and
    of the last ones, buckets, seconds of the optimizer, the least seconds of a micro-step."""
    compute: float
    rows: int
    micro: int
    size: float
    last: float
    buckets: int
    optimizer: float = OPTIMIZER
    shared: float = 0.0
    launch: float = LAUNCH


def step(load, n, link, width=1.0, zero=False):
    """(seconds of a step on n ranks, share of the sending that is hidden, micro-steps); width: of what is sent."""
    parts = -(-load.rows // (n * load.micro))
    each = max(load.launch, load.compute / n / parts)
    way = link.inside if n <= HOST else min(link.inside, link.outside)
    around, delay = load.size * (n - 1) / n / way, math.ceil(math.log2(n)) * link.delay
    sending = 2 * (width * around + load.buckets * delay)
    seen = max(sending * load.last / load.size, sending - each * 2 / 3)
    moving = load.optimizer - (load.shared * (n - 1) / n - around - delay) * zero
    return parts * each + seen + moving, 1 - seen / sending if sending else 1.0, parts


def table(what, load, link):
    """A row for each number of ranks, in fp32 and bf16."""
    alone, rows = step(load, 1, link)[0], []
    for n in (n for n in NUMBERS if n <= load.rows):
        (wide, hidden, parts), (half, behind, _) = (step(load, n, link, width) for width in (1.0, 0.5))
        rows.append(dict(what=what, ranks=n, micro_steps=parts, fp32_ms=1e3 * wide, fp32_hidden=hidden, fp32_times=alone / wide,
                         zero_ms=1e3 * step(load, n, link, zero=True)[0], bf16_ms=1e3 * half, bf16_hidden=behind, bf16_times=alone / half))
    return rows


def load_of(run, compute, micro, **more):
    """The Load of a run whose gradients take one rank so many seconds, in micro-steps of so many rows at most."""
    sums = train.GradientSum(run.model.parameters(), run.dtype)
    sizes = [4 * sum(p.numel() for p in bucket) for bucket in sums.buckets]
    last = sum(sizes[sums.place[run.model.wte.weight]:])         # the table's gradient is whole when all others are
    return Load(compute, run.s.tokens_per_step // run.s.block_size, micro, sum(sizes), last, len(sizes), **more)


def muon_flops(run):
    """Of orthogonalising every matrix once."""
    shapes = [sorted(p.shape) for p in run.groups(run.model)['matrices']['params']]
    return len(train.POLAR_EXPRESS) * sum(4 * a * a * b + 2 * a ** 3 for a, b in shapes)


def main(own, rest, argv):
    """Prints the tables: cards as stated, and this machine as measured."""
    refuse(not [a for a in rest if not a.startswith('--')], '--ranks names no config: it takes what is to be trained')
    s, ideas = train.read_settings(rest)
    run = measured(ideas)(s)
    parts, run.accum = run.accum, 1              # a micro-step is measured: a step of a card takes a CPU minutes
    run.step()

    def gradients():
        run.model.zero_grad()
        return run.gradients(1)[0]
    times = bench_mfu.seconds_each(dict(gradients=gradients, both=lambda: run.descend(gradients())), run.device, 1)[0]
    one, both = (min(times[name]) for name in ('gradients', 'both'))
    flops, rows, said = run.flops_per_token * s.tokens_per_step, [], []
    for card, link in LINKS.items():
        own.card = card
        speed = card_peak(own) * own.card_mfu
        work = muon_flops(run) / speed
        rows += table(card, load_of(run, flops / speed, s.micro_batch_size, optimizer=OPTIMIZER + work, shared=work), link)
        said.append(f'{card}: {link.about}, {card_peak(own) / 1e12:.0f} TFLOP/s at {own.card_mfu:.0%}, all stated.')
    gpu = run.device == 'cuda'
    link = next((link for card, link in LINKS.items() if gpu and card in sample.hardware('cuda')), LINKS['RTX 4090'])
    moving = max(0.0, both - one)
    here = load_of(run, one * parts, run.micro, optimizer=moving, shared=moving, launch=0.0)
    rows += table('this machine', here, link)
    print(*text_table(COLUMNS, rows), '', *said,
          f'this machine: {sample.hardware(run.device)}, {1e3 * one:.1f} ms for the gradients of a micro-step of {run.micro} '
          f'rows and {1e3 * here.optimizer:.1f} for the optimizer measured; link stated: {link.about}.', f'Counted: {flops:.3g} FLOPs a step, {here.size / 2**20:.1f} MiB of gradients in fp32, '
          f'{here.buckets} buckets, the last {here.last / 2**20:.1f} MiB unhidden.', f'Estimated, of a card: {1e3 * LAUNCH:g} ms at least '
          f'for a micro-step, {1e3 * OPTIMIZER:g} to start the optimizer, beside {muon_flops(run):.3g} FLOPs of Muon.', sep='\n')

# SPDX-License-Identifier: GPL-2.0-or-later
"""What is done to which migration.  Nothing here touches a process."""

import random
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from lab import modes
from lab.faults.failcalls import ALWAYS, CALLS, Rule
from lab.memory import KIB, MIB, PAGE_SIZE


# How guests migrate.  A mode is drawn by its place here.
MODES = {name: (modes.MODES[name].also(multifd_channels=3)
                if modes.MODES[name].multifd else modes.MODES[name])
         for name in (
             'precopy', 'xbzrle', 'multifd', 'multifd-legacy', 'postcopy',
             'preempt', 'file', 'mapped-ram', 'mapped-ram-multifd',
             'sparse-ram', 'sparse-ram-xbzrle', 'sparse-ram-multifd',
             'sparse-ram-postcopy', 'sparse-ram-preempt')}

NETWORK = tuple(name for name, mode in MODES.items() if not mode.file)
FILES = tuple(name for name, mode in MODES.items() if mode.file)
POSTCOPY = tuple(name for name, mode in MODES.items() if mode.postcopy)
PRECOPY = tuple(name for name in NETWORK if name not in POSTCOPY)

# Kinds of RAM, see sides.py.  'anonymous' and those after it have no file that
# can be asked for holes.
SHARED_FILES = ('memfd', 'shm-file')
BACKENDS = ('memfd', 'shm-file', 'hugetlb', 'anonymous', 'memfd-private',
            'anonymous-shared')


# What goes wrong

CLOSE, RESET, HALF = 'close', 'reset', 'half-close'
TO_DESTINATION, TO_SOURCE = 'to-destination', 'to-source'


@dataclass(frozen=True)
class Cut:
    """A connection that breaks.

    channel: counted in the order in which they are made.
    after: bytes that still get through, in this direction.
    how: CLOSE and RESET end both directions, HALF this one.
    everywhere: all connections break together with it.
    """
    channel: int
    direction: str
    after: int
    how: str
    everywhere: bool


# When something happens: after bytes on the main channel (or of the file that
# is written), or after seconds
BYTES, SECONDS = 'bytes', 'seconds'


@dataclass(frozen=True)
class Moment:
    """A point of a migration; what counts is one of BYTES and SECONDS."""
    what: str
    value: float


FAULTS = ('none', 'kill-source', 'kill-destination', 'cut', 'cancel',
          'cancel-early', 'pause', 'cut-recover', 'oom', 'tmpfs-full',
          'truncate', 'calls', 'held')


@dataclass(frozen=True)
class Case:
    """One migration, with one kind of fault, and then another without.

    seed: of the content of RAM, and of what is accessed.
    old_data: what the destination's RAM holds before, in bytes.
    data, zeroes: what the source's RAM holds, in bytes; the rest is a hole.
    bandwidth: max-bandwidth, and max-postcopy-bandwidth; 0: no limit.
    switch: when to start postcopy, in bytes on the main channel.
    moment: of what is neither a cut nor a call that fails.
    cuts: of the first channel, and of those of the recoveries.
    rules: calls that fail, by side: 'source', 'destination'.
    pause_destination: migrate-pause is said to the destination.
    limit: bytes of memory that the destination may have in its cgroup in
    addition to what it has when it starts, or that its tmpfs has.
    peeks: threads that access RAM of the destination during postcopy.
    second_mode: of the second attempt.
    """
    seed: int
    mode: str
    fault: str
    source: str = 'memfd'
    destination: str = 'memfd'
    size: int = 64 * MIB
    data: int = 1 * MIB
    zeroes: int = 1 * MIB
    old_data: int = 0
    transport: str = 'unix'
    return_path: bool = False
    exit_on_error: bool = True
    bandwidth: int = 0
    switch: int = 0
    moment: Optional[Moment] = None
    cuts: Tuple[Cut, ...] = ()
    rules: Tuple[Tuple[str, Rule], ...] = ()
    pause_destination: bool = False
    limit: int = 0
    peeks: int = 0
    second_mode: str = ''

    @property
    def how(self) -> modes.Mode:
        """The mode itself."""
        return MODES[self.mode]

    @property
    def fails_calls_of(self) -> Tuple[str, ...]:
        """Which sides have calls that fail."""
        return tuple(sorted({side for side, _ in self.rules}))

    def describe(self) -> str:
        """All that is not as it always is, in one line."""
        words = []
        for each in fields(self):
            value = getattr(self, each.name)
            if value == each.default and each.name not in ('mode', 'fault'):
                continue
            words.append(f'{each.name}={_shown(value)}')
        return ' '.join(words)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return '[' + ', '.join(_shown(each) for each in value) + ']'
    if isinstance(value, Moment):
        return f'{value.what}:{value.value:g}'
    if isinstance(value, (Cut, Rule)):
        return '{' + ' '.join(f'{name}:{each}' for name, each
                              in asdict(value).items()) + '}'
    return str(value)


# What the man pages say that calls fail with.  EINTR is for a signal that
# came: once or twice, not for ever.
ERRNOS: Dict[str, Tuple[str, ...]] = {
    'lseek': ('EBADF', 'EINVAL', 'ENXIO', 'EOVERFLOW', 'ESPIPE'),
    'fallocate': ('EBADF', 'EFBIG', 'EINTR', 'EINVAL', 'EIO', 'ENODEV',
                  'ENOSPC', 'ENOSYS', 'EOPNOTSUPP', 'EPERM', 'ESPIPE',
                  'ETXTBSY'),
    'fstat': ('EACCES', 'EBADF', 'EFAULT', 'EINVAL', 'ELOOP',
              'ENAMETOOLONG', 'ENOENT', 'ENOMEM', 'ENOTDIR', 'EOVERFLOW'),
    'cachestat': ('EBADF', 'EFAULT', 'EINVAL', 'ENOSYS', 'EOPNOTSUPP',
                  'EPERM'),
    'pread': ('EAGAIN', 'EBADF', 'EFAULT', 'EINTR', 'EINVAL', 'EIO',
              'EISDIR', 'ENXIO', 'EOVERFLOW', 'ESPIPE'),
    'madvise': ('EACCES', 'EAGAIN', 'EBADF', 'EBUSY', 'EFAULT', 'EINVAL',
                'EIO', 'ENOMEM', 'EPERM', 'EHWPOISON'),
    'mincore': ('EAGAIN', 'EFAULT', 'EINVAL', 'ENOMEM'),
    'pagemap-open': ('EACCES', 'EMFILE', 'ENFILE', 'ENOENT', 'ENOMEM',
                     'EPERM'),
    'pagemap-scan': ('EBADF', 'EFAULT', 'EINTR', 'EINVAL', 'ENOMEM',
                     'ENOTTY'),
    'pagemap-read': ('EAGAIN', 'EBADF', 'EFAULT', 'EINTR', 'EINVAL', 'EIO',
                     'EISDIR', 'ENXIO', 'EOVERFLOW', 'ESPIPE'),
    'uffd-copy': ('EAGAIN', 'ENOMEM'),
}

# Calls that only fail a few times, because a signal, or a shortage of memory,
# does not last
_A_FEW = 3


def passes(call: str, name: str) -> bool:
    """Whether it is an error that goes away when the call is repeated."""
    return name == 'EINTR' or call == 'uffd-copy'


def calls_of(backend: str, mode: str, side: str) -> Tuple[str, ...]:
    """What may be called for RAM of this kind."""
    how = MODES[mode]
    many = 'multifd' in how.capabilities or 'sparse-ram' in how.capabilities \
        or 'mapped-ram' in how.capabilities
    pagemap = ('pagemap-scan', 'pagemap-open', 'pagemap-read')
    calls: Tuple[str, ...]
    if backend in SHARED_FILES:
        calls = ('lseek', 'cachestat', 'pread', 'fstat')
        calls += ('fallocate',) if side == 'destination' else ()
    elif backend == 'hugetlb':
        calls = ('pread', 'mincore', 'fstat')
    elif side == 'source':
        return ()
    elif backend == 'memfd-private':
        calls = ('lseek', 'cachestat', 'pread') + pagemap
    elif backend == 'anonymous-shared':
        calls = ('madvise',)
    else:
        calls = pagemap if many else ()
    if how.postcopy and side == 'destination':
        calls += ('uffd-copy',)
    return calls


# Drawing

# Without the content of RAM: devices, names, headers
_OVERHEAD = 64 * KIB
_PAGE_HEADER = 9


def stream_length(case: Case) -> int:
    """About how many bytes there are on the main channel."""
    zero_pages = (case.size - case.data) // PAGE_SIZE
    if 'sparse-ram' in case.how.capabilities:
        zero_pages = case.zeroes // PAGE_SIZE
    length = _OVERHEAD + zero_pages * _PAGE_HEADER
    if 'multifd' not in case.how.capabilities:
        length += case.data
    elif case.mode == 'multifd':
        length = _OVERHEAD
    return length


def channel_length(case: Case, channel: int, direction: str) -> int:
    """About how many bytes go through a channel."""
    if direction == TO_SOURCE:
        return 512
    if channel == 0:
        return stream_length(case)
    if case.how.postcopy:
        return case.data // 4
    return case.data // (case.how.channels - 1) + 8 * KIB


class Dice:
    """Draws from a seed."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self.choice = self._random.choice
        self.uniform = self._random.uniform
        self.randrange = self._random.randrange

    def maybe(self, chance: float) -> bool:
        """True that often."""
        return self._random.random() < chance

    def position(self, length: int) -> int:
        """Anywhere in so many bytes, and often near the start."""
        if self.maybe(0.3):
            return int(2 ** self.uniform(0, max(1, length).bit_length())) - 1
        return self.randrange(length + 1)

    def weighted(self, weights: Mapping[str, float]) -> str:
        """A key, as often as its value says."""
        return self._random.choices(list(weights), list(weights.values()))[0]


_WEIGHTS = {'none': 1, 'kill-source': 10, 'kill-destination': 12, 'cut': 26,
            'cancel': 10, 'cancel-early': 2, 'pause': 8, 'cut-recover': 12,
            'oom': 3, 'tmpfs-full': 4, 'truncate': 3, 'calls': 24}

_MODES_OF = {'cut': NETWORK, 'cancel-early': PRECOPY, 'pause': POSTCOPY,
             'cut-recover': POSTCOPY, 'truncate': FILES,
             'cancel': tuple(MODES), 'oom': NETWORK}

_SIZE_HUGETLB = 16 * MIB


def _draw_cut(dice: Dice, case: Case) -> Cut:
    channel = dice.randrange(case.how.channels)
    direction = (TO_SOURCE if dice.maybe(0.15) and
                 (case.return_path or case.how.postcopy)
                 else TO_DESTINATION)
    return Cut(channel, direction,
               dice.position(channel_length(case, channel, direction)),
               dice.choice((CLOSE, RESET, HALF)), dice.maybe(0.3))


def _draw_moment(dice: Dice, case: Case) -> Moment:
    if case.how.file or dice.maybe(0.3):
        return Moment(SECONDS, round(dice.uniform(0, 0.5), 3))
    return Moment(BYTES, dice.position(stream_length(case)))


def draw_rule(dice: Dice, call: str) -> Rule:
    """A call that fails from some time on, or a few times, or at random."""
    name = dice.choice(ERRNOS[call])
    few = passes(call, name)
    return Rule(call, name, first=int(2 ** dice.uniform(0, 7)) - 1,
                count=1 + dice.randrange(_A_FEW) if few or dice.maybe(0.3)
                else 0,
                chance=ALWAYS if few or dice.maybe(0.6)
                else dice.choice((0.01, 0.1, 0.5)),
                seed=dice.randrange(1 << 32))


def _draw_rules(dice: Dice, case: Case) -> Tuple[Tuple[str, Rule], ...]:
    sides = dice.choice((('source',), ('destination',), ('source', 'destination')))
    rules: List[Tuple[str, Rule]] = []
    for side in sides:
        calls = list(calls_of(getattr(case, side), case.mode, side))
        for _ in range(1 + dice.randrange(2)):
            if calls:
                call = dice.choice(calls)
                calls.remove(call)
                rules.append((side, draw_rule(dice, call)))
    return tuple(rules)


def _draw_backends(dice: Dice, fault: str) -> Tuple[str, str]:
    weights = {'memfd': 6.0, 'shm-file': 3.0, 'hugetlb': 1.5,
               'anonymous': 2.0, 'memfd-private': 1.0}
    if fault == 'calls':
        weights['anonymous-shared'] = 1.0
    if fault == 'tmpfs-full':
        return dice.choice(('memfd', 'anonymous')), 'tmpfs'
    source = dice.weighted(weights)
    if source == 'hugetlb' or dice.maybe(0.6):
        return source, source
    del weights['hugetlb']
    return source, dice.weighted(weights)


def _is_known_to_be_zero(case: Case) -> bool:
    """Whether the destination does not look at what it has created itself, as
    the kernel cannot be asked: nothing but QEMU can have written to it.
    """
    return ('anonymous' in case.destination
            and bool({'multifd', 'mapped-ram'} & set(case.how.capabilities))
            and (case.destination == 'anonymous-shared'
                 or any('pagemap' in rule.call for _, rule in case.rules)))


def draw(seed: int) -> Case:
    """The case that belongs to this seed."""
    dice = Dice(seed)
    fault = dice.weighted(_WEIGHTS)
    mode = dice.choice(_MODES_OF.get(fault, tuple(MODES)))
    how = MODES[mode]
    source, destination = _draw_backends(dice, fault)
    amount = int(MIB * 2 ** dice.uniform(-2, 2.5)) // PAGE_SIZE * PAGE_SIZE
    case = Case(
        seed, mode, fault, source, destination,
        size=_SIZE_HUGETLB if source == 'hugetlb' else 64 * MIB,
        data=amount,
        zeroes=dice.choice((0, MIB // 4, 4 * MIB)),
        old_data=0 if destination == 'tmpfs' or fault == 'oom'
        else dice.choice((0, MIB, 4 * MIB)),
        transport=dice.choice(('unix', 'tcp')),
        return_path=dice.maybe(0.4),
        exit_on_error=dice.maybe(0.7),
        second_mode=mode if dice.maybe(0.5) else dice.choice(tuple(MODES)))
    if dice.maybe(0.6) or how.file and fault not in ('calls', 'truncate'):
        case = replace(case, bandwidth=2 * stream_length(case))
    if how.postcopy:
        case = replace(case, switch=dice.position(stream_length(case)),
                       peeks=dice.choice((0, 1, 3)))
    if fault in ('cut', 'cut-recover'):
        case = replace(case, cuts=(_draw_cut(dice, case),))
    if fault in ('cut-recover', 'pause'):
        case = replace(case, switch=case.switch // 2,
                       bandwidth=max(512 * KIB, case.data))
        case = replace(case, cuts=case.cuts + tuple(
            _draw_cut(dice, case) for _ in range(dice.choice((0, 0, 1, 2)))))
    if fault in ('kill-source', 'kill-destination', 'cancel', 'pause'):
        case = replace(case, moment=_draw_moment(dice, case),
                       pause_destination=dice.maybe(0.3))
    if fault == 'truncate':
        case = replace(case, moment=Moment(BYTES, dice.uniform(0, 1)))
    if fault == 'calls':
        case = replace(case, rules=_draw_rules(dice, case))
    if fault == 'oom':
        case = replace(case, limit=dice.randrange(2 * amount))
    if fault == 'tmpfs-full':
        case = replace(case, limit=dice.randrange(2 * amount) // PAGE_SIZE
                       * PAGE_SIZE + 4 * PAGE_SIZE)
    if _is_known_to_be_zero(case):
        case = replace(case, old_data=0)
    return case


def drawn(first: int, faults: Sequence[str] = (),
          modes: Sequence[str] = ()) -> Iterator[Case]:
    """Cases of the seeds from first on, of these kinds (default: all)."""
    seed = first
    while True:
        case = draw(seed)
        if (not faults or case.fault in faults) and (not modes or case.mode in modes):
            yield case
        seed += 1


# The fixed set

def _first(call: str, name: str) -> Rule:
    """A call that fails at once, and as long as that makes sense."""
    return Rule(call, name, count=2 if passes(call, name) else 0)


def fixed() -> List[Tuple[str, Case]]:
    """A few cases of each kind that always are the same, with names."""
    cases: List[Tuple[str, Case]] = []

    def add(name: str, mode: str, fault: str, **more: Any) -> None:
        cases.append((name, Case(len(cases), mode, fault, **more)))

    def add_calls(name: str, mode: str, *calls: Tuple[str, str, str],
                  **more: Any) -> None:
        """calls: side, name and errno of each."""
        add(f'calls/{name}', mode, 'calls', old_data=MIB, rules=tuple(
            (side, _first(call, error)) for side, call, error in calls), **more)

    # Files are asked with lseek() where the kernel has no cachestat()
    for name in ERRNOS['lseek']:
        for side, mode in (('source', 'precopy'), ('destination', 'sparse-ram')):
            add_calls(f'{side}/lseek/{name}', mode, (side, 'cachestat', 'ENOSYS'),
                      (side, 'lseek', name))
    for name in ERRNOS['fallocate']:
        add_calls(f'destination/fallocate/{name}', 'precopy',
                  ('destination', 'fallocate', name))
    add_calls('multifd', 'multifd', ('source', 'cachestat', 'EINVAL'),
              ('destination', 'fallocate', 'EOPNOTSUPP'))
    add_calls('cachestat', 'sparse-ram', ('source', 'cachestat', 'ENOSYS'),
              ('destination', 'cachestat', 'EPERM'), destination='shm-file')
    add_calls('cachestat-and-pread', 'precopy', ('source', 'cachestat', 'ENOSYS'),
              ('source', 'pread', 'EIO'))
    add_calls('madvise', 'precopy', ('destination', 'madvise', 'EINVAL'),
              destination='anonymous-shared')
    add_calls('pagemap', 'sparse-ram', ('destination', 'pagemap-scan', 'ENOTTY'),
              ('destination', 'pagemap-read', 'EIO'), source='anonymous',
              destination='anonymous')
    add('calls/postcopy', 'postcopy', 'calls', old_data=MIB, peeks=2,
        rules=(('destination', Rule('cachestat', 'ENOSYS')),
               ('destination', Rule('lseek', 'EINVAL', first=2))))
    half = Case(0, 'precopy', '').data // 2
    for mode in ('precopy', 'multifd', 'sparse-ram'):
        add(f'kill-destination/{mode}', mode, 'kill-destination',
            moment=Moment(BYTES, half if mode != 'multifd' else 4096))
        add(f'cancel/{mode}', mode, 'cancel',
            moment=Moment(BYTES, half if mode != 'multifd' else 4096))
    add('kill-source/precopy', 'precopy', 'kill-source', moment=Moment(BYTES, half))
    add('kill-source/mapped-ram', 'mapped-ram', 'kill-source',
        bandwidth=2 * MIB, moment=Moment(SECONDS, 0.2))
    add('truncate/mapped-ram', 'mapped-ram', 'truncate', moment=Moment(BYTES, 0.9))
    add('cancel-early/precopy', 'precopy', 'cancel-early')
    for how in (CLOSE, RESET, HALF):
        add(f'cut/{how}', 'sparse-ram', 'cut', transport='tcp',
            cuts=(Cut(0, TO_DESTINATION, half, how, False),))
    add('cut/multifd-channel', 'multifd', 'cut',
        cuts=(Cut(2, TO_DESTINATION, 100 * KIB, RESET, False),))
    for mode in ('postcopy', 'sparse-ram-preempt'):
        add(f'cut-recover/{mode}', mode, 'cut-recover', peeks=2,
            bandwidth=1 * MIB, switch=16 * KIB, transport='tcp',
            cuts=(Cut(0, TO_DESTINATION, 16 * KIB, RESET, True),))
        add(f'pause/{mode}', mode, 'pause', peeks=2,
            bandwidth=1 * MIB, switch=16 * KIB, moment=Moment(SECONDS, 0.1))
    add('cut-recover/preempt-channel', 'preempt', 'cut-recover', peeks=2,
        bandwidth=1 * MIB, switch=16 * KIB,
        cuts=(Cut(1, TO_DESTINATION, 8 * KIB, CLOSE, False),))
    for mode in POSTCOPY:
        add(f'held/{mode}', mode, 'held', data=4 * MIB, zeroes=4 * MIB,
            bandwidth=256 * KIB, switch=16 * KIB)
    add('tmpfs-full/too-small', 'precopy', 'tmpfs-full',
        destination='tmpfs', limit=MIB // 2)
    add('tmpfs-full/just-enough', 'sparse-ram', 'tmpfs-full',
        destination='tmpfs', limit=MIB + 128 * KIB)
    return cases


assert set(ERRNOS) == set(CALLS)

# SPDX-License-Identifier: GPL-2.0-or-later
"""The programs that measure and test what migration does to guest RAM with holes.

Run from the top of the project as "python3 -m lab.NAME", by make, or from anywhere as
"scripts/lab NAME"; --help says what each of them does.

demo, bench, plot     show, measure and draw it
fuzz                  damaged streams
faults                migrations that fail
random                migrations that are drawn from a seed
oldnew                migrations to and from other QEMUs; their streams
guest                 Linux, migrated back and forth
run_tests, ci         all test suites, and what they stand on
tests                 of all this, for unittest

What these share:

modes       the ways to migrate
qemu        a QEMU process: starts, stops it, talks to it
ram         the kinds of guest RAM, and that of a running QEMU, without populating it
content     what guest RAM holds: written, filled, compared
migrate     configuring a migration, waiting for it, and ending it in time
measure     anything that reads all of guest RAM, measured
stream      what is in a migration stream
outcome     what became of a test
jobs        many cases, side by side
base        the QEMU series, and where it lies
cgroup, host, memory    what this machine has
cli, terminal           what command lines and output have in common
qtest_client            reads and writes memory as a guest would
"""


class UserError(Exception):
    """Something that whoever runs the script can act on; one sentence."""

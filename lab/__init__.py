# SPDX-License-Identifier: GPL-2.0-or-later
"""Measuring what a migration does to guest RAM that has holes.

base       which QEMU series this is about, and where it lies
guest      starts and stops a QEMU, and talks to it
cgroup     a limit to the memory of a guest's process
host       what else the kernel lets a program have
memory     what the kernel says about guest RAM, without ever populating it
blocks     the RAM blocks of any QEMU, one by one: content and pages
migrate    one migration from start to end: migrate_once(config) -> Result
report     its results as text
ping       how long a monitor keeps silent
operation  anything that reads all of guest RAM: measure() -> Measurement
rows       what the benchmark measures, and its targets
summary    its measurements as medians, tables and verdicts
program    programs as modules, for tests
cli        what the scripts' command lines have in common
"""


class UserError(Exception):
    """Something that whoever runs the script can act on; one sentence."""

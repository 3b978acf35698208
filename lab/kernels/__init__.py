# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernels that hosts have, each in a VM of our own QEMU."""

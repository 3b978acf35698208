# SPDX-License-Identifier: GPL-2.0-or-later
"""The stack around QEMU that guests with shared memory have, of real parts.

Debian, its QEMU, qemu-storage-daemon, virtiofsd and libvirt, in namespaces of
their own, and a guest that checks its memory, its disk and its directory.
"""

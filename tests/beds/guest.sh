#!/bin/sh
# Init of a guest. The host's filesystem is its root, read-only; BED is the bed's folder, MODULES the base of its modules.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run PYTHONDONTWRITEBYTECODE=1 TMPDIR=/run
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /mnt
mkdir /mnt/nfs
modprobe -d "$MODULES" nfsv4
ip link set lo up
ip link set vec0 up
ip addr add "10.99.0.1$NODE/24" dev vec0
hostname "node$NODE"
mount -t nfs4 -o "vers=4.2,proto=tcp,port=2049,$OPTIONS" 10.99.0.1:/export /mnt/nfs || echo "no NFS mount"
cd "$REPO" && PYTHONPATH=$REPO "$PYTHON" -m tests.beds.agent
echo "agent ended: $?"
/bin/busybox poweroff -f || poweroff -f

#!/bin/busybox sh
# The guest's first program: sets the stage, starts udevd, runs /vm/command, powers off.
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t sysfs sys /sys
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mkdir -p /dev/pts /dev/shm /run/udev /var/lib /var/log
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
hostname vm
stty -F /dev/ttyS1 raw -echo 115200
stty -F /dev/ttyS2 raw -echo 115200
modprobe -q xhci_pci
modprobe -q virtio_pci
/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add -s usb -s block -s net
udevadm settle -t 60

# Kept open to the end: the last one to close a serial line waits until all of it is sent.
exec 3<>/dev/ttyS2
echo ready >&3
# Output goes through a pipe, so that no program takes the serial line for its terminal.
mkfifo /run/output
cat /run/output >/dev/ttyS1 &
cd /root
sh /vm/command </dev/null >/run/output 2>&1
status=$?
wait $!
sync
echo "exit $status" >&3
exec 3>&-
poweroff -f

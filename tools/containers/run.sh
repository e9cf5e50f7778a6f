#!/bin/bash
# Run a command with a Podman of its own, the images, and a clone of this repository, in new namespaces.
#
#     run.sh FOLDER COMMAND...
#
# FOLDER has a tar file with the system of each image. Whatever happens to the command or to us, no process, network or
# mount is left: all of them end with the namespaces. What the containers printed is kept in FOLDER/logs.
set -eu
if [ $$ != 1 ]; then
    exec unshare --mount --net --pid --mount-proc --fork --kill-child bash "$0" "$@"
fi
folder=$1 here=$(dirname "$0")
shift
# There Podman keeps what ends with the machine.
mount -t tmpfs tmpfs /run
mkdir -p /var/lib/cni
mount -t tmpfs tmpfs /var/lib/cni
mount -t tmpfs tmpfs /dev/shm
ip link set lo up

# Who lacks CAP_SYS_RESOURCE can't raise a limit, as Podman would by default.
below() {
    limit=10000
    [ "$1" = unlimited ] || [ "$1" -gt 20000 ] || limit=$(($1 / 2))
    echo $limit:$limit
}
cat > /run/containers.conf << END
[containers]
default_ulimits = ["nofile=$(below "$(ulimit -Hn)")", "nproc=$(below "$(ulimit -Hu)")"]
[engine]
# Neither systemd nor version 2 of cgroups is needed.
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
# With netavark, Debian's PgBouncer (c-ares) keeps the address that a database had before a restart.
network_backend = "cni"
network_config_dir = "$folder/networks"
END
cat > /run/storage.conf << END
[storage]
driver = "overlay"
runroot = "/run/containers"
graphroot = "$folder/storage"
END
# Where short names belong. All images are there; nothing is pulled.
echo 'unqualified-search-registries = ["docker.io"]' > /run/registries.conf
export CONTAINERS_CONF=/run/containers.conf CONTAINERS_STORAGE_CONF=/run/storage.conf
export CONTAINERS_REGISTRIES_CONF=/run/registries.conf

remove() {
    podman pod rm --all --force
    podman rm --all --force --time 0
    podman volume rm --all --force
    podman secret ls --format '{{.Name}}' | xargs --no-run-if-empty podman secret rm
} > /dev/null 2>&1
finish() {
    rm -rf "$folder/logs"
    mkdir "$folder/logs"
    for name in $(podman ps --all --format '{{.Names}}'); do
        podman logs "$name" > "$folder/logs/$name" 2>&1 || true
    done
    remove
}
# Also what is left from a run that was killed.
remove
trap finish EXIT

for image in postgres:17 pgbouncer:latest odoo:19.0; do
    service=${image%:*}
    [ $service = pgbouncer ] && place=docker.io/edoburu || place=docker.io/library
    if ! podman image exists localhost/debian-$service; then
        podman import "$folder/$service.tar" localhost/debian-$service
    fi
    podman build --pull=never --tag $place/$image --file "$here/$service.Containerfile" "$here"
done > /dev/null 2> "$folder/build.log" || { cat "$folder/build.log" >&2; exit 2; }
rm -rf "$folder/clone"
(umask 077 && git clone --quiet --no-hardlinks "$here/../.." "$folder/clone")
network=bus_alt_connection_default
podman network exists $network || podman network create $network > /dev/null

"$@"

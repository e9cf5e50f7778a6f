#!/bin/bash
# Start what stands in for CloudNativePG: PostgreSQL with TLS and PgBouncer, under the names of its services, with its
# secrets. The folder for files is the argument.
set -eu
cd "$1"
start="podman run --detach --network bus_alt_connection_default"
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout server.key -out ca.crt -days 2 \
    -subj /CN=odoo-db-rw -addext subjectAltName=DNS:odoo-db-rw
$start --name odoo-db-rw --env POSTGRES_PASSWORD=postgres postgres:17
until podman exec odoo-db-rw pg_isready --host localhost; do sleep 0.2; done
for file in ca.crt server.key; do
    podman cp $file odoo-db-rw:/etc/postgresql/
    podman exec odoo-db-rw chown postgres /etc/postgresql/$file
done
podman exec -i odoo-db-rw psql --username=postgres << END
CREATE ROLE odoo LOGIN PASSWORD 'odoo';
CREATE DATABASE odoo OWNER odoo;
ALTER SYSTEM SET ssl_cert_file = '/etc/postgresql/ca.crt';
ALTER SYSTEM SET ssl_key_file = '/etc/postgresql/server.key';
ALTER SYSTEM SET ssl = on;
SELECT pg_reload_conf();
END

cat > pooler.ini << END
[databases]
* = host=odoo-db-rw port=5432
[pgbouncer]
listen_addr = *
listen_port = 5432
auth_type = scram-sha-256
auth_file = /etc/pgbouncer/userlist.txt
pool_mode = transaction
max_client_conn = 1000
default_pool_size = 20
END
chmod 644 pooler.ini
$start --name odoo-db-pooler --volume "$PWD/pooler.ini:/etc/pgbouncer/pgbouncer.ini:ro" \
    localhost/bus_alt_connection_pgbouncer
podman tag localhost/bus_alt_connection_odoo docker.io/example/odoo-with-addon:19.0

# Podman 4.3 has two forms of secrets: one for variables, and one for files, which it does not decode.
account=$(printf odoo | base64)
printf '{"username": "%s", "password": "%s"}' "$account" "$account" | podman secret create odoo-db-app -
printf '{"apiVersion": "v1", "kind": "Secret", "data": {"ca.crt": "%s"}}' "$(awk '{printf "%s\\n", $0}' ca.crt)" |
    podman secret create odoo-db-ca -

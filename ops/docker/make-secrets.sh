#!/bin/sh
# Makes the passwords that docker-compose.yml gives to its services: once, into ./secrets or the folder that is named.
#
# The files are readable by all, since the accounts in containers differ; the folder isn't, and keeps others out.
set -eu

folder=${1:-secrets}
if [ -d "$folder" ] && [ ! -e "$folder/engine_secret" ]; then
    # Younger than the others, and alone in being added.
    (umask 022 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' > "$folder/engine_secret")
    echo "Added $folder/engine_secret." >&2
    exit
fi
if [ -e "$folder" ]; then
    echo "$folder is there already; what is in it may be in use." >&2
    exit 1
fi
mkdir -m 700 "$folder"
umask 022

new() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

write() {
    printf '%s\n' "$2" > "$folder/$1"
}

valkey=$(new)
valkey_sha256=$(printf %s "$valkey" | sha256sum | cut -d ' ' -f 1)

# Of the superuser, whom nothing uses but the image when it makes the database.
write postgres_password "$(new)"
write database_url "postgresql://vectormill:$(new)@postgres:5432/vectormill"
# Of the queries that are asked for in SQL: it may read what you grant to it.
write sql_url "postgresql://vectormill_queries:$(new)@postgres:5432/vectormill"
write redis_url "redis://vectormill:$valkey@valkey:6379/0"
write valkey_acl "user default off
user vectormill on #$valkey_sha256 ~* &* +@all -@dangerous +info"
write flower_password "$(new)"
write webhook_secret "whsec_$(head -c 32 /dev/urandom | base64)"
write engine_secret "$(new)"
write grafana_password "$(new)"
echo "Made $folder. Flower's user is vectormill, its password in $folder/flower_password." >&2

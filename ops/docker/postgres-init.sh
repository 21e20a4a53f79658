#!/bin/sh
# Run by the Postgres image when it has made its data: a plain role that owns the database, as the URL names them, and
# the extension, which only a superuser may create.
set -eu

url=$(cat /run/secrets/database_url)
user=${url#*//}
password=${user#*:}
export ROLE="${user%%:*}" ROLE_PASSWORD="${password%%@*}" DATABASE="${url##*/}"

psql --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv role ROLE
\getenv password ROLE_PASSWORD
\getenv database DATABASE
create role :"role" login password :'password';
create database :"database" owner :"role";
\connect :"database"
create extension vector;
SQL

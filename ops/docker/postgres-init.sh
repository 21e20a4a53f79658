#!/bin/sh
# Run by the Postgres image when it has made its data: a plain role that owns the database, and one that may do nothing
# yet, for the queries that are asked for in SQL, as their URLs name them; and the extension, which only a superuser may
# create.
set -eu

url=$(cat /run/secrets/database_url)
user=${url#*//}
password=${user#*:}
export ROLE="${user%%:*}" ROLE_PASSWORD="${password%%@*}" DATABASE="${url##*/}"

url=$(cat /run/secrets/sql_url)
user=${url#*//}
password=${user#*:}
export QUERIES="${user%%:*}" QUERIES_PASSWORD="${password%%@*}"

psql --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv role ROLE
\getenv password ROLE_PASSWORD
\getenv database DATABASE
\getenv queries QUERIES
\getenv queries_password QUERIES_PASSWORD
create role :"role" login password :'password';
create role :"queries" login password :'queries_password';
alter role :"queries" set default_transaction_read_only = on;
alter role :"queries" set statement_timeout = '30min';
create database :"database" owner :"role";
\connect :"database"
create extension vector;
SQL

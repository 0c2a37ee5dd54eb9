/* softmobile--1.0.sql: built from sql/install/, part by part. */

\echo Use "CREATE EXTENSION softmobile" to load this file. \quit

-- Headquarters receives UTF-8 and so does the reader of this script.
SET client_encoding = 'UTF8';

REVOKE ALL ON SCHEMA softmobile FROM PUBLIC;
GRANT USAGE ON SCHEMA softmobile TO PUBLIC;
COMMENT ON SCHEMA softmobile IS
'Softmobile for PostgreSQL: outbox with lanes, delivery worker, central inbox. Names are described in README.md.';

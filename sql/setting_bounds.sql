-- The bounds of the settings, and who may change or see them. In PostgreSQL's own words, which 16 and 17 have changed.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
ALTER SYSTEM SET softmobile.sync_interval = 0;
ALTER SYSTEM SET softmobile.retry_interval = '8d';
ALTER SYSTEM SET softmobile.probe_interval = 0;
ALTER SYSTEM SET softmobile.max_attempts = 0;
ALTER SYSTEM SET softmobile.max_attempts = 1001;
ALTER SYSTEM SET softmobile.batch_max_events = 0;
ALTER SYSTEM SET softmobile.batch_max_events = 20001;
ALTER SYSTEM SET softmobile.batch_max_bytes = '1kB';
ALTER SYSTEM SET softmobile.compression = 'brotli';
ALTER SYSTEM SET softmobile.connect_timeout = '10ms';
ALTER SYSTEM SET softmobile.request_timeout = '2h';
ALTER SYSTEM SET softmobile.retention = 0;
ALTER SYSTEM SET softmobile.retention = '4000d';
ALTER SYSTEM SET softmobile.unknown_branch = 'ignore';
-- what only a superuser sets, and what everybody does
CREATE ROLE regress_clerk;
SET ROLE regress_clerk;
\set VERBOSITY terse
SET softmobile.central_url = 'https://central.example';
SET softmobile.branch_id = 'S2';
SET softmobile.auth_token_file = '/x';
SET softmobile.enable_transfers = off;
SET softmobile.reason = 'by anybody';
SHOW softmobile.auth_token_file;
RESET ROLE;
DROP ROLE regress_clerk;

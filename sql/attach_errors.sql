-- Every wrong input to attach(), detach(), register_branch() and the settings: its SQLSTATE, and a hint that says what to do.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET client_min_messages = warning;
-- n, SQLSTATE: message | detail | hint
CREATE FUNCTION told(commands text[]) RETURNS TABLE (n bigint, told text) LANGUAGE sql AS $$
	SELECT n, concat_ws(E'\n  ', f.state || ': ' || f.message, 'detail: ' || nullif(f.detail, ''), 'hint: ' || nullif(f.hint, ''))
	FROM unnest(commands) WITH ORDINALITY AS c (command, n) CROSS JOIN LATERAL shop.failure(command) AS f ORDER BY n
$$;
CREATE DOMAIN money_amount AS numeric(12,2);
CREATE DOMAIN sale_total AS money_amount CHECK (value >= 0);
CREATE DOMAIN amount_in_words AS text;
CREATE TABLE sale (id integer PRIMARY KEY, "Folio n" text, total sale_total, day date, store text, words amount_in_words);
CREATE TABLE keyless (id integer, v text);
CREATE VIEW a_view AS SELECT * FROM sale;
CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM sale;
CREATE FOREIGN DATA WRAPPER regress_fdw;
CREATE SERVER regress_server FOREIGN DATA WRAPPER regress_fdw;
CREATE FOREIGN TABLE a_foreign (id integer) SERVER regress_server;
CREATE SEQUENCE a_sequence;
CREATE UNLOGGED TABLE an_unlogged (id integer PRIMARY KEY);
CREATE TEMP TABLE a_temp (id integer PRIMARY KEY);
CREATE TABLE parted (id integer PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (10);
CREATE TYPE a_type AS (id integer);

\pset format unaligned
\pset tuples_only on
\pset fieldsep ' '
-- what cannot be attached
SELECT * FROM told(ARRAY[
	$$SELECT softmobile.attach('shop.no_table', 'sale')$$,
	$$SELECT softmobile.attach(4294967295::oid::regclass, 'sale')$$,
	$$SELECT softmobile.attach(NULL, 'sale')$$,
	$$SELECT softmobile.attach('a_view', 'sale', key => '{id}')$$,
	$$SELECT softmobile.attach('a_matview', 'sale', key => '{id}')$$,
	$$SELECT softmobile.attach('a_foreign', 'sale', key => '{id}')$$,
	$$SELECT softmobile.attach('a_sequence', 'sale')$$,
	$$SELECT softmobile.attach('sale_pkey', 'sale')$$,
	$$SELECT softmobile.attach('a_type', 'sale')$$,
	$$SELECT softmobile.attach('an_unlogged', 'sale')$$,
	$$SELECT softmobile.attach('a_temp', 'sale')$$,
	$$SELECT softmobile.attach('pg_catalog.pg_class', 'sale')$$,
	$$SELECT softmobile.attach('information_schema.sql_parts', 'sale', key => '{feature_id}')$$,
	$$SELECT softmobile.attach('softmobile.outbox_event_1', 'sale')$$,
	$$SELECT softmobile.attach('softmobile.branch', 'sale')$$,
	$$SELECT softmobile.attach('parted_1', 'sale')$$]);
-- how it cannot be attached
SELECT * FROM told(ARRAY[
	$$SELECT softmobile.attach('keyless', 'sale')$$,
	$$SELECT softmobile.attach('sale', 'sale', key => '{}')$$,
	$$SELECT softmobile.attach('sale', 'sale', key => '{NULL}')$$,
	$$SELECT softmobile.attach('sale', 'sale', key => '{id,nix}')$$,
	$$SELECT softmobile.attach('sale', 'sale', key => '{ctid}')$$,
	$$SELECT softmobile.attach('sale', 'sale', branch_column => 'tienda')$$,
	$$SELECT softmobile.attach('sale', 'sale', branch_column => 'store', branch_fallback_column => 'tienda')$$,
	$$SELECT softmobile.attach('sale', 'sale', reason_column => 'why')$$,
	$$SELECT softmobile.attach('sale', 'sale', folio_column => 'folio n')$$,
	$$SELECT softmobile.attach('sale', 'sale', amount_column => 'amount')$$,
	$$SELECT softmobile.attach('sale', 'sale', amount_column => 'day')$$,
	$$SELECT softmobile.attach('sale', 'sale', amount_column => 'words')$$,
	$$SELECT softmobile.attach('sale', 'sale', date_column => 'sold_at')$$,
	$$SELECT softmobile.attach('sale', 'sale', date_column => 'store')$$,
	$$SELECT softmobile.attach('sale', 'sale', sku_column => 'sku')$$,
	$$SELECT softmobile.attach('sale', 'sale', quantity_column => 'quantity')$$,
	$$SELECT softmobile.attach('sale', 'sale', quantity_column => 'store')$$,
	$$SELECT softmobile.attach('sale', NULL)$$,
	$$SELECT softmobile.attach('sale', '')$$,
	$$SELECT softmobile.attach('sale', '1sale')$$,
	$$SELECT softmobile.attach('sale', 'sale.line')$$,
	$$SELECT softmobile.attach('sale', 'señal')$$,
	$$SELECT softmobile.attach('sale', repeat('x', 64))$$,
	$$SELECT softmobile.attach('sale', 'sale', priority => 'URGENT')$$,
	$$SELECT softmobile.attach('sale', 'sale', priority => '')$$,
	$$SELECT softmobile.attach('sale', 'sale', initial => 'all')$$,
	$$SELECT softmobile.attach('sale', 'sale', initial => NULL)$$]);
SELECT count(*) FROM softmobile.captured_table;
-- a domain over a domain over a number is one; one column may serve twice
SELECT softmobile.attach('sale', 'sale', amount_column => 'total', date_column => 'day', sku_column => 'Folio n', folio_column => 'Folio n', quantity_column => 'total');
SELECT softmobile.named_columns(c), column_numbers FROM softmobile.captured_table c;
SELECT softmobile.detach('sale');
-- twice; a priority that another table of the type does not have
SELECT softmobile.attach('sale', repeat('x', 63), priority => 'low'), softmobile.detach('sale'), softmobile.attach('sale', 'sale', priority => 'High');
SELECT * FROM told(ARRAY[
	$$SELECT softmobile.attach('sale', 'sale')$$,
	$$SELECT softmobile.attach('sale', 'other')$$,
	$$SELECT softmobile.attach('keyless', 'sale', key => '{id}', priority => 'LOW')$$,
	$$SELECT softmobile.detach('keyless')$$,
	$$SELECT softmobile.detach('shop.no_table')$$,
	$$SELECT softmobile.detach(NULL)$$]);

-- branches
SELECT * FROM told(ARRAY[
	$$SELECT softmobile.register_branch(NULL, 'x')$$,
	$$SELECT softmobile.register_branch('', 'x')$$,
	$$SELECT softmobile.register_branch('   ', 'x')$$,
	$$SELECT softmobile.register_branch(E'a\tb', 'x')$$,
	$$SELECT softmobile.register_branch(E'a\nb', 'x')$$,
	$$SELECT softmobile.register_branch(repeat('x', 101), 'x')$$,
	$$SELECT softmobile.register_branch(repeat('ñ', 51), 'x')$$,
	$$SELECT softmobile.register_branch('X1', NULL)$$,
	$$SELECT softmobile.register_branch('X1', '  ')$$,
	$$SELECT softmobile.register_branch('X1', 'x', receipts => 'perhaps')$$,
	$$SELECT softmobile.register_branch('X1', 'x', receipts => NULL)$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'central.example')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'ftp://central.example/')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'file:///etc/passwd')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://me:secret@central.example/')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https:///path')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://:443/')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://central.example/?branch=1')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://central.example/#part')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://central example/')$$,
	$$SELECT softmobile.register_branch('X1', 'x', 'https://ñandú.example/')$$]);
SELECT count(*) FROM softmobile.branch;
-- odd ids that are none the less good
SELECT softmobile.register_branch(b, 'odd') FROM unnest('{"a b", it''s, "q\"q", ñandú 😀, ../x, %41}'::text[] || repeat('x', 100)) AS b;
SELECT branch_id, count(*) FILTER (WHERE l.log_id = l.lane_id) AS lanes FROM softmobile.branch b JOIN softmobile.outbox_lane l USING (branch_id)
WHERE name = 'odd' GROUP BY 1 ORDER BY 1;
-- changed by registering again
SELECT softmobile.register_branch('X2', ' Norte ', 'HTTPS://central.example:8443/base', receipts => 'none');
SELECT softmobile.register_branch(' X2 ', 'Sur', '', active => false);
SELECT branch_id, name, central_url IS NULL, active, receipts, registered_by = current_user FROM softmobile.branch WHERE branch_id = 'X2';

-- a branch that is not registered
SET softmobile.reason = 'regression test';
SELECT softmobile.attach('keyless', 'inventory', key => '{id}', branch_column => 'v');
SHOW softmobile.unknown_branch;
BEGIN;
INSERT INTO keyless VALUES (1, 'new one');
SELECT op, branch FROM fresh();
SELECT branch_id, status FROM softmobile.sync_outbox;
ROLLBACK;

-- settings: contexts and contents; setting_bounds has their bounds
SELECT * FROM told(ARRAY[
	$$SET softmobile.central_url = 'central.example'$$,
	$$SET softmobile.central_url = 'https://me:secret@central.example'$$,
	$$SET softmobile.central_url = 'gopher://central.example'$$,
	$$SET softmobile.central_url = 'https://central.example?x=1'$$,
	$$SET softmobile.branch_id = E'a\tb'$$,
	$$SET softmobile.branch_id = ' x'$$,
	$$SELECT set_config('softmobile.branch_id', repeat('x', 101), false)$$,
	$$SET softmobile.unknown_branch = 'refuse'$$,
	$$SET softmobile.sync_interval = 10$$,
	$$SET softmobile.worker_role = 'x'$$,
	$$SET softmobile.ca_file = '/x'$$,
	$$SET softmobile.no_such_setting = 1$$,
	$$ALTER DATABASE postgres SET softmobile.sync_interval = 10$$]);
DROP SERVER regress_server CASCADE;
DROP FOREIGN DATA WRAPPER regress_fdw;

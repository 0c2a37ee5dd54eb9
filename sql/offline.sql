-- Before a cut: printers, backups, and the items of the checklist that need no central, each made to fail.
-- The rest is test/t/056_offline.pl.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'corte programado';
SET softmobile.central_url = 'http://127.0.0.1:1';

-- Ages and times are not the same in two runs.
CREATE FUNCTION told(told text) RETURNS text LANGUAGE sql AS $$
	SELECT regexp_replace(regexp_replace(told, '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d(:\d\d)?', '<time>', 'g'), '\d+ seconds|a moment', '<n> seconds', 'g')
$$;
CREATE FUNCTION items(VARIADIC codes text[]) RETURNS TABLE (code text, line integer, ok boolean, detail text, hint text) LANGUAGE sql AS $$
	SELECT c.code, c.line, c.ok, told(c.detail), told(c.hint) FROM softmobile.offline_checklist('S1') c WHERE c.code = ANY (codes) ORDER BY array_position(codes, c.code)
$$;

/* What it looks at. */

SELECT code, line, item FROM softmobile.offline_checklist('S1', days => 3);
SELECT count(*) FILTER (WHERE ok IS NULL OR item IS NULL OR detail IS NULL) AS unclear, count(*) FILTER (WHERE ok AND hint IS NOT NULL) AS needless,
	count(*) FILTER (WHERE NOT ok AND hint IS NULL) AS helpless, count(*) - count(DISTINCT code) AS doubled
FROM softmobile.offline_checklist('S1');
SELECT f.* FROM unnest(ARRAY[
	$$SELECT * FROM softmobile.offline_checklist('S9')$$,
	$$SELECT * FROM softmobile.offline_checklist(NULL)$$,
	$$SELECT * FROM softmobile.offline_checklist('S1', 0)$$,
	$$SELECT * FROM softmobile.offline_checklist('S1', NULL)$$]) AS c (command) CROSS JOIN failure(c.command) AS f;

/* Tables, reasons, folios. */

SELECT * FROM items('attached', 'reasons', 'folios');
CREATE TABLE sale (id integer PRIMARY KEY, folio text, total numeric);
CREATE TABLE transfer (id integer PRIMARY KEY);
SELECT softmobile.attach('sale', 'sale', require_reason => false), softmobile.attach('transfer', 'transfer') \g /dev/null
SELECT * FROM items('attached', 'reasons', 'folios');
SELECT softmobile.detach('sale'), softmobile.attach('sale', 'sale', folio_column => 'folio', amount_column => 'total') \g /dev/null
SELECT * FROM items('attached', 'reasons', 'folios');

/* Flags: a group that is off is not captured, its sales pass, and the checklist says so. */

SELECT * FROM items('flag_hybrid_prep', 'flag_purchases_sales', 'flag_transfers');
SET softmobile.enable_purchases_sales = off;
SELECT * FROM items('flag_hybrid_prep', 'flag_purchases_sales', 'flag_transfers');
INSERT INTO sale VALUES (1, 'A-1', 10);
SELECT count(*) AS captured FROM fresh();
RESET softmobile.enable_purchases_sales;
INSERT INTO sale VALUES (2, 'A-2', 10);
SET softmobile.enable_hybrid_prep = off;
SELECT * FROM items('flag_hybrid_prep');
RESET softmobile.enable_hybrid_prep;
CREATE ROLE offline_seller;
GRANT USAGE ON SCHEMA shop TO offline_seller;
ALTER ROLE offline_seller SET softmobile.enable_transfers = off;
SELECT * FROM items('flag_transfers');
ALTER ROLE offline_seller RESET softmobile.enable_transfers;
-- An ordinary user cannot switch them.
SET ROLE offline_seller;
SELECT f.state, f.message FROM unnest('{hybrid_prep, purchases_sales, transfers}'::text[]) AS flag
	CROSS JOIN failure(format('SET softmobile.enable_%s = off', flag)) AS f;
SELECT f.state, f.message FROM failure('ALTER ROLE offline_seller SET softmobile.enable_transfers = off') AS f;
RESET ROLE;

/* Triggers and replica mode. */

SELECT * FROM items('triggers', 'replica_mode');
ALTER TABLE sale DISABLE TRIGGER "!softmobile_capture";
DROP TRIGGER "!softmobile_refuse_truncate" ON transfer;
SELECT * FROM items('triggers');
ALTER TABLE sale ENABLE REPLICA TRIGGER "!softmobile_capture";
SELECT * FROM items('triggers');
ALTER TABLE sale ENABLE ALWAYS TRIGGER "!softmobile_capture";
SELECT softmobile.cover('transfer');
SELECT * FROM items('triggers');
ALTER TABLE softmobile.outbox_event_2 ENABLE TRIGGER refuse_row_change;
ALTER EVENT TRIGGER softmobile_follow_ddl DISABLE;
SELECT * FROM items('triggers');
ALTER TABLE softmobile.outbox_event_2 ENABLE ALWAYS TRIGGER refuse_row_change;
ALTER EVENT TRIGGER softmobile_follow_ddl ENABLE ALWAYS;
SET session_replication_role = replica;
SELECT * FROM items('replica_mode');
RESET session_replication_role;
ALTER ROLE offline_seller SET session_replication_role = replica;
SELECT * FROM items('replica_mode');
ALTER ROLE offline_seller RESET session_replication_role;
SELECT * FROM items('triggers', 'replica_mode');

/* Branches. */

SELECT * FROM items('active', 'registered');
SELECT softmobile.register_unknown_branches('{S7, S8}') \g /dev/null
SET softmobile.drop_undelivered = on;
SELECT softmobile.register_branch('S1', 'Centro', active => false) \g /dev/null
RESET softmobile.drop_undelivered;
SELECT * FROM items('active', 'registered');
SELECT softmobile.register_branch(b, b) FROM unnest('{S1, S7, S8}'::text[]) AS b \g /dev/null
SELECT * FROM items('active', 'registered');
-- Rows of a table without a branch column, and nobody has said whose they are.
BEGIN;
SET LOCAL softmobile.branch_id = '';
SELECT softmobile.register_unknown_branches(ARRAY[current_database()::text]) \g /dev/null
SELECT i.ok, replace(i.detail, current_database(), '<database>') AS detail, replace(i.hint, current_database(), '<database>') AS hint FROM items('registered') AS i;
ROLLBACK;

/* Printers. */

SELECT * FROM items('printers');
SELECT branch_id, printer, confirmed_at > now() - interval '1 minute' AS now, confirmed_by = current_user AS by_me FROM softmobile.confirm_printer(branch => 'S1', printer => ' caja 1 ');
SELECT * FROM softmobile.confirm_printer('S1', 'etiquetas') \g /dev/null
SELECT ok, regexp_replace(detail, 'by \w+', 'by <me>', 'g') AS detail FROM items('printers');
UPDATE softmobile.printer_confirmation SET confirmed_at = now() - interval '5 days' WHERE printer = 'etiquetas';
SELECT ok, regexp_replace(detail, 'by \w+', 'by <me>', 'g') AS detail, hint FROM items('printers');
SELECT softmobile.forget_printer('S1', 'etiquetas') \g /dev/null
SELECT ok FROM items('printers');
SELECT action, branch_id, reason, details FROM softmobile.sync_audit WHERE action LIKE '%\_printer' ORDER BY id;
SELECT f.* FROM unnest(ARRAY[
	$$SELECT softmobile.confirm_printer('S1', '  ')$$,
	$$SELECT softmobile.confirm_printer('S1', NULL)$$,
	$$SELECT softmobile.confirm_printer('S1', E'caja\n1')$$,
	$$SELECT softmobile.confirm_printer('S9', 'caja 1')$$,
	$$SELECT softmobile.confirm_printer(NULL, 'caja 1')$$,
	$$SELECT softmobile.forget_printer('S1', 'caja 9')$$]) AS c (command) CROSS JOIN failure(c.command) AS f;

/* Backups and retention. */

SELECT * FROM items('backup');
SELECT kind, place, recorded_by = current_user AS by_me FROM softmobile.record_backup('pg_dump', now() - interval '3 days', 'nas');
SELECT * FROM items('backup');
SELECT softmobile.record_backup(kind => 'pg_basebackup') \g /dev/null
SELECT * FROM items('backup');
SELECT f.* FROM unnest(ARRAY[
	$$SELECT softmobile.record_backup('')$$,
	$$SELECT softmobile.record_backup('pg_dump', NULL)$$,
	$$SELECT softmobile.record_backup('pg_dump', 'infinity')$$]) AS c (command) CROSS JOIN failure(c.command) AS f;
SELECT ok, detail, hint FROM softmobile.offline_checklist('S1') WHERE code = 'retention';
SELECT ok, detail, hint FROM softmobile.offline_checklist('S1', 20) WHERE code = 'retention';

/* The reference data that is there, and the preparation before. */

SELECT * FROM items('prepared', 'reference');
INSERT INTO softmobile.offline_preparation (branch_id, started_at, finished_at, ok, prepared_by, steps)
VALUES ('S1', now(), now(), true, 'ana', '[{"step": "reference", "ok": true}]');
SELECT * FROM items('prepared', 'reference');
INSERT INTO softmobile.reference_data VALUES ('S1', 'catalogue', '[]', 2, 'd', NULL, now() - interval '9 days', now() - interval '3 days');
INSERT INTO softmobile.offline_preparation (branch_id, started_at, finished_at, ok, prepared_by, steps)
VALUES ('S1', now(), now(), false, 'ana', '[{"step": "sync", "ok": true}, {"step": "reference", "ok": false}]');
SELECT * FROM items('prepared', 'reference');
UPDATE softmobile.offline_preparation SET ok = true, finished_at = now() - interval '2 days';
UPDATE softmobile.reference_data SET checked_at = now();
SELECT * FROM items('prepared', 'reference');

/* The queue. */

SELECT * FROM items('previous_sync', 'conflicts', 'failed', 'retries', 'sync_after', 'discrepancies');
INSERT INTO sale VALUES (3, 'A-3', 10);
INSERT INTO softmobile.sync_session (branch_id, mode, status, finished_at, triggered_by, error_message) VALUES ('S1', 'manual', 'failed', now(), 'ana', 'offline');
SELECT * FROM items('previous_sync', 'sync_after');
INSERT INTO softmobile.sync_session (branch_id, mode, status, finished_at, triggered_by, error_message) VALUES ('S1', 'manual', 'success', now(), 'ana', NULL);
SELECT * FROM items('previous_sync', 'sync_after');
-- Rows that were there when their table was attached, which the worker cannot read while the table is locked.
BEGIN;
INSERT INTO softmobile.outbox_snapshot (relation, end_block, root, branch_id, actor) VALUES ('sale', 1, 'sale', 'S1', 'ana');
SELECT * FROM items('previous_sync');
SELECT * FROM softmobile.prepare_queue('S1') WHERE step = 'queue';
ROLLBACK;
INSERT INTO softmobile.discrepancy (branch_id, kind, entity_type, entity_id, detail, session_id) VALUES ('S1', 'different', 'sale', '1', 'total', 1);
SELECT * FROM items('discrepancies');
-- An event of last week, which the trigger would have dated itself.
INSERT INTO softmobile.outbox_event_1 (seq, created_at, id, lane_id, entity_no, op, entity_id, actor, payload)
SELECT 1000, now() - interval '8 days', gen_random_uuid(), l.lane_id, t.entity_no, 'i', '9', 'ana', '{"new":{}}'
FROM softmobile.outbox_lane l, softmobile.outbox_entity t
WHERE l.branch_id = 'S1' AND l.priority = 'HIGH' AND t.entity_type = 'sale' ORDER BY l.epoch_no DESC LIMIT 1;
SELECT * FROM items('oldest_unsent');

/* A check that cannot be made keeps no other from being made. */

BEGIN;
ALTER FUNCTION softmobile.disk_space(oid) RENAME TO gone;
SELECT * FROM items('disk', 'retention');
ROLLBACK;

/* Rights. */

SELECT softmobile.grant_role('offline_seller', 'app') \g /dev/null
SET ROLE offline_seller;
SELECT count(*) > 20 AS items FROM softmobile.offline_checklist('S1');
SELECT name, content, bytes FROM softmobile.reference_data;
SELECT name, age < interval '1 hour' AS fresh FROM softmobile.reference_data_status;
SELECT confirmed_by FROM softmobile.confirm_printer('S1', 'caja 1');
SELECT f.state, f.message FROM unnest(ARRAY[
	$$SELECT softmobile.forget_printer('S1', 'caja 1')$$,
	$$SELECT softmobile.record_backup('pg_dump')$$,
	$$SELECT softmobile.check_central('S1', 1)$$,
	$$UPDATE softmobile.reference_data SET content = '[]'$$]) AS c (command) CROSS JOIN failure(c.command) AS f;
RESET ROLE;
SELECT softmobile.grant_role('offline_seller', 'operator') \g /dev/null
SET ROLE offline_seller;
SELECT place FROM softmobile.record_backup('pg_dump', place => 'disk 2');
RESET ROLE;

-- Reference data goes by names that are safe in a URL.
SELECT f.* FROM unnest(ARRAY[
	$$SELECT softmobile.prepare_offline('S1', '{catalogue, ../tokens}')$$,
	$$SELECT softmobile.prepare_offline('S1', '{NULL}')$$,
	$$SELECT softmobile.prepare_offline('S9')$$,
	$$SELECT softmobile.prepare_offline(NULL)$$]) AS c (command) CROSS JOIN failure(c.command) AS f;
SELECT softmobile.percent_encode(E'Sucursal 1/ñ?&#%-_.~\x7f€'), softmobile.percent_encode('') = '' AS empty;

DROP OWNED BY offline_seller;
DROP ROLE offline_seller;

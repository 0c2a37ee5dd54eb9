-- sync_explain(): where a receipt is and what happens next, in one sentence, for every state that a row and its event can be in.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
-- Times and ids blotted out.
CREATE FUNCTION told(folio text, branch text DEFAULT NULL) RETURNS text LANGUAGE sql AS $$
	SELECT regexp_replace(regexp_replace(softmobile.sync_explain(folio, branch), '\d{4}-\d\d-\d\d \d\d:\d\d:\d\d P[DS]T', '<time>', 'g'), '[0-9a-f]{8}-[0-9a-f-]{27}', '<id>', 'g')
$$;
CREATE FUNCTION lane(entity text, OUT lane_id integer, OUT seq bigint) LANGUAGE sql AS $$
	SELECT e.lane_id, e.seq FROM softmobile.outbox_event e WHERE e.entity_id = entity ORDER BY e.created_at LIMIT 1
$$;
\set ECHO all
\pset format unaligned
\pset tuples_only on
\x
SELECT * FROM failure($$SELECT softmobile.sync_explain(NULL)$$);
SELECT * FROM failure($$SELECT softmobile.sync_explain(' ')$$);
SELECT * FROM failure($$SELECT softmobile.sync_explain('A-1', 'S9')$$);
\x
SELECT told('A-1');
SET softmobile.reason = 'regression test';
SELECT softmobile.register_branch('S2', 'Norte', 'http://127.0.0.1:9');
CREATE TABLE sale (id integer PRIMARY KEY, store text, folio varchar(20), total numeric, sold_at timestamptz DEFAULT now());
INSERT INTO sale VALUES (1, 'S2', 'OLD-1', 1, now() - interval '1 day');
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', folio_column => 'folio', amount_column => 'total', date_column => 'sold_at');
CREATE TABLE note (id integer, line integer, folio bigint, PRIMARY KEY (id, line));
SELECT softmobile.attach('note', 'note', folio_column => 'folio');

-- nowhere
SELECT told('A-1');
SELECT told('A-1', 'S2');
-- there before
SELECT told('OLD-1');
-- waits; nobody said where headquarters are
INSERT INTO sale VALUES (2, 'S1', 'A-2', 10);
SELECT told('A-2');
SELECT told('A-2', 'S1');
SELECT told('A-2', 'S2');
SELECT told(' A-2 ');
-- waits; told where, but this test has no headquarters
INSERT INTO sale VALUES (3, 'S2', 'A-3', 10);
SELECT told('A-3') ~ '^Receipt A-3 \(sale 3 of branch S2\) has waited since <time>: (no worker is running|headquarters have been out of reach|it is sent next)';
-- waits; switched off
SELECT softmobile.register_branch('S3', 'Sur', active => false);
INSERT INTO sale VALUES (4, 'S3', 'A-4', 10);
SELECT told('A-4');
-- waits; not registered (in one transaction, for the worker would register it)
BEGIN;
INSERT INTO sale VALUES (5, 'S4', 'A-5', 10);
SELECT told('A-5');
ROLLBACK;
-- a key of two columns, a folio that is a number, no date
INSERT INTO note VALUES (7, 1, 700);
SELECT told('700');
-- written as it is stored, or with other blanks
INSERT INTO sale VALUES (6, 'S1', 'A-6 ', 10);
SELECT told('A-6'), told('A-6 ');

-- not captured
ALTER TABLE sale DISABLE TRIGGER "!softmobile_capture";
INSERT INTO sale VALUES (7, 'S1', 'A-7', 10, now()), (8, 'S1', 'A-8', 10, now() - interval '60 days'), (9, 'S1', 'A-9', 10, NULL), (10, 'S1', 'A-10', 10, 'infinity'), (11, 'S1', 'A-11', 10, '-infinity');
INSERT INTO note VALUES (7, 2, 701);
SELECT told('A-7');
ALTER TABLE sale ENABLE TRIGGER "!softmobile_capture";
SELECT told('A-7');
SET softmobile.enable_purchases_sales = off;
SELECT told('A-7');
RESET softmobile.enable_purchases_sales;
SELECT told('A-8');
SELECT told('A-9');
SELECT told('A-10');
SELECT told('A-11');
-- a date without a time zone may be of either side of the moment when the table was attached
BEGIN;
CREATE TABLE slip (id integer PRIMARY KEY, folio text, sold_at timestamp);
INSERT INTO slip VALUES (1, 'T-1', localtimestamp - interval '2 days');
SELECT softmobile.attach('slip', 'slip', folio_column => 'folio', date_column => 'sold_at');
SET LOCAL softmobile.enable_hybrid_prep = off;
INSERT INTO slip VALUES (2, 'T-2', localtimestamp - interval '6 hours'), (3, 'T-3', localtimestamp + interval '1 day');
SELECT told('T-1');
SELECT told('T-2');
SELECT told('T-3');
ROLLBACK;
-- the table has been attached for long, and the log begins later: purged
BEGIN;
UPDATE softmobile.captured_table SET attached_at = now() - interval '90 days';
SELECT told('A-8');
DELETE FROM softmobile.outbox_segment;
INSERT INTO softmobile.outbox_segment (segment, current, opened_at) VALUES (1, true, now());
UPDATE softmobile.outbox_epoch SET opened_at = now() - interval '90 days';
SELECT told('A-8');
SELECT told('A-9');
SELECT told('A-7');
ROLLBACK;

-- The worker's doing, done here by hand.
-- delivered
INSERT INTO softmobile.outbox_batch (batch_id, lane_id, kind, members, last_seq, events, attempt_count, settled_at)
SELECT 1000, lane_id, 'sent', int8multirange(int8range(1, seq, '[]')), seq, 1, 1, '2026-01-31 12:00-08' FROM lane('2');
SELECT softmobile.sync_explain('A-2');
SET TimeZone = 'America/Mexico_City';
SELECT softmobile.sync_explain('A-2');
RESET TimeZone;
-- changed since
UPDATE sale SET total = 11 WHERE id = 2;
SELECT told('A-2');
-- and the change rejected
INSERT INTO softmobile.outbox_exception (id, lane_id, seq, entity_no, entity_id, op, branch_id, created_at, actor, folio, payload, kind, state, attempt_count, last_attempt_at, next_attempt_at, error_message)
SELECT e.id, e.lane_id, e.seq, e.entity_no, e.entity_id, e.op, 'S1', e.created_at, e.actor, e.folio, e.payload, 'rejected', 'failed', 2, now(), now() + interval '10 minutes', 'http 422: total too high'
FROM softmobile.outbox_event e WHERE e.entity_id = '2' AND e.op = 'u';
SELECT told('A-2');
UPDATE softmobile.outbox_exception SET attempt_count = 5;
SELECT told('A-2');
UPDATE softmobile.outbox_exception SET state = 'queued';
SELECT told('A-2');
-- the row is gone
DELETE FROM sale WHERE id = 2;
SELECT told('A-2');
SELECT told('A-2', 'S2');
DELETE FROM softmobile.outbox_exception;

-- rejected, in conflict, behind another, accepted later, decided
INSERT INTO sale VALUES (20, 'S1', 'X-1', 1), (21, 'S1', 'X-2', 1), (22, 'S1', 'X-3', 1), (23, 'S1', 'X-4', 1), (24, 'S1', 'X-5', 1);
INSERT INTO softmobile.outbox_exception (id, lane_id, seq, entity_no, entity_id, op, branch_id, created_at, actor, folio, payload, kind, state, waits_for, attempt_count, last_attempt_at, next_attempt_at, error_message)
SELECT e.id, e.lane_id, e.seq, e.entity_no, e.entity_id, e.op, 'S1', e.created_at, e.actor, e.folio, e.payload, x.kind, x.state,
	CASE x.kind WHEN 'waiting' THEN first_value(e.id) OVER (ORDER BY e.entity_id) END, 1, now(), now() + interval '10 minutes', 'rejected: unknown article'
FROM softmobile.outbox_event e JOIN (VALUES ('20', 'rejected', 'failed'), ('21', 'conflict', 'failed'), ('22', 'waiting', 'failed'), ('23', 'rejected', 'delivered'), ('24', 'conflict', 'dropped')) AS x (id, kind, state) ON x.id = e.entity_id;
SELECT told('X-1');
SELECT told('X-2');
SELECT told('X-3');
SELECT told('X-4');
SELECT told('X-5');
UPDATE softmobile.outbox_exception x SET entity_id = '20' WHERE kind = 'waiting';
SELECT told('X-1');

-- in a batch that failed; and what stands behind it (the answers differ where no worker runs)
INSERT INTO sale VALUES (30, 'S3', 'F-1', 1), (31, 'S3', 'F-2', 1);
BEGIN;
UPDATE softmobile.branch SET active = true, central_url = 'http://127.0.0.1:9' WHERE branch_id = 'S3';
UPDATE softmobile.outbox_lane l SET status = 'failed', batch = int8multirange(int8range(1, f.seq, '[]')), attempt_count = 3, first_attempt_at = now(), last_attempt_at = now(), next_attempt_at = now(), error_message = 'http 503: busy'
FROM lane('30') AS f WHERE f.lane_id = l.lane_id;
CREATE FUNCTION waits(why text) RETURNS text LANGUAGE sql AS $$
	SELECT CASE WHEN w.running THEN why ELSE 'no worker is running (' || w.detail || '), and nothing is sent until one does' END FROM softmobile.worker_status() w
$$;
SELECT replace(told('F-1'), waits('the last attempt of its batch, at <time>, failed (http 503: busy), and it will be tried again at <time>'), '<batch failed>');
SELECT replace(told('F-2'), waits('the last attempt of its branch, at <time>, failed (http 503: busy), and it will be tried again at <time>'), '<batch of branch failed>');
UPDATE softmobile.outbox_lane l SET error_message = 'offline' FROM lane('30') AS f WHERE f.lane_id = l.lane_id;
SELECT replace(told('F-1'), waits('headquarters have been out of reach since <time>, and it is sent by itself as soon as they answer'), '<offline>');
SELECT replace(told('F-2'), waits('headquarters have been out of reach since <time>, and it is sent by itself as soon as they answer'), '<offline>');
UPDATE softmobile.outbox_lane l SET status = 'idle', batch = NULL, error_message = NULL FROM lane('30') AS f WHERE f.lane_id = l.lane_id;
SELECT replace(told('F-2'), waits('up to 2 events are sent before it'), '<two before it>');
-- settled, and the ledger knows no more of it
UPDATE softmobile.outbox_lane l SET settled = int8multirange(int8range(1, f.seq, '[]')) FROM lane('30') AS f WHERE f.lane_id = l.lane_id;
SELECT told('F-1');
ROLLBACK;

-- several
INSERT INTO sale SELECT n, 'S' || n % 2 * 2 + 1, 'MANUAL', 1 FROM generate_series(40, 42) AS n;
INSERT INTO note VALUES (8, 1, 800), (8, 2, 800);
SELECT told('MANUAL');
SELECT told('MANUAL', 'S3');
SELECT told('800');
INSERT INTO sale SELECT n, 'S1', 'MANUAL', 1 FROM generate_series(100, 300) AS n;
SELECT told('MANUAL');
-- one of many partitions; moved to another branch: an insert there
UPDATE sale SET store = 'S1' WHERE id = 41;
SELECT told('MANUAL', 'S1') ~ '^More than 100 receipts of branch S1 have the folio MANUAL: ';

-- queued with attach(initial => 'snapshot')
CREATE TABLE old_sale (id integer PRIMARY KEY, folio text, at date);
INSERT INTO old_sale VALUES (1, 'Z-1', '2020-01-31'), (2, 'Z-2', NULL);
BEGIN;
SELECT softmobile.attach('old_sale', 'old_sale', folio_column => 'folio', date_column => 'at', initial => 'snapshot');
SELECT told('Z-1');
SELECT softmobile.capture_existing('old_sale', 0, 1, 'test', NULL);
DELETE FROM softmobile.outbox_snapshot;
SELECT told('Z-1');
SELECT told('Z-2');
ROLLBACK;

-- a table that cannot be read
CREATE FOREIGN DATA WRAPPER regress_fdw;
CREATE SERVER regress_server FOREIGN DATA WRAPPER regress_fdw;
CREATE TABLE ticket (id integer, folio text) PARTITION BY LIST (id);
SELECT softmobile.attach('ticket', 'ticket', key => '{id}', folio_column => 'folio');
CREATE FOREIGN TABLE ticket_1 PARTITION OF ticket FOR VALUES IN (1) SERVER regress_server;
SELECT told('A-1');
SELECT told('A-4');
SET client_min_messages = warning;
DROP FOREIGN DATA WRAPPER regress_fdw CASCADE;
RESET client_min_messages;

-- the application asks, and reads nothing else
CREATE ROLE regress_clerk;
SELECT softmobile.grant_role('regress_clerk', 'app');
SET ROLE regress_clerk;
SELECT softmobile.sync_explain('A-2') ~ 'no attached table', softmobile.sync_explain(folio => 'A-3', branch => 'S2') ~ 'has waited since';
SELECT softmobile.kept_since();
RESET ROLE;
DROP OWNED BY regress_clerk;
DROP ROLE regress_clerk;

-- The outbox as its users see it; invariant 4: nobody edits it.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE sale (id integer PRIMARY KEY, store text, total numeric);
CREATE TABLE supplier (id integer PRIMARY KEY);
CREATE TABLE store (id integer PRIMARY KEY);
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', amount_column => 'total'), softmobile.attach('supplier', 'supplier'), softmobile.attach('store', 'store');
INSERT INTO store VALUES (1);
INSERT INTO supplier VALUES (1);
INSERT INTO sale VALUES (1, 'S1', 10), (2, 'S1', 20);
UPDATE sale SET total = 11 WHERE id = 1;
DELETE FROM sale WHERE id = 2;

-- the queue
SELECT branch_id, entity_type, entity_id, operation, payload, reason, actor = current_user AS mine, status, priority, attempt_count,
	last_attempt_at, error_message, conflict_flag, created_at = updated_at AS untouched, created_at <= clock_timestamp() AS born
FROM softmobile.sync_outbox ORDER BY created_at;
SELECT branch_id, entity_type, priority, total, pending, failed, conflicts, latest_update = oldest_pending AS one_moment, last_conflict_at
FROM softmobile.sync_outbox_stats ORDER BY entity_type;
SELECT count(*) FROM softmobile.sync_history;

-- nobody edits it: not its owner, not in replica mode, not through a segment
SELECT o.command, f.* FROM unnest('{
	"UPDATE softmobile.outbox_event SET reason = null", "UPDATE softmobile.outbox_event_1 SET payload = ''{}''", "UPDATE ONLY softmobile.outbox_event_1 SET seq = seq + 1",
	"DELETE FROM softmobile.outbox_event", "DELETE FROM softmobile.outbox_event_1", "TRUNCATE softmobile.outbox_event", "TRUNCATE softmobile.outbox_event_1", "TRUNCATE ONLY softmobile.outbox_event",
	"UPDATE softmobile.sync_outbox SET status = ''SENT''", "DELETE FROM softmobile.sync_outbox"}'::text[]) AS o (command), failure(o.command) AS f \gx
BEGIN;
SET LOCAL session_replication_role = replica;
SELECT state, message FROM failure('UPDATE softmobile.outbox_event SET reason = null');
SELECT state, message FROM failure('DELETE FROM softmobile.outbox_event_1');
SELECT state, message FROM failure('TRUNCATE softmobile.outbox_event_1');
ROLLBACK;
-- MERGE and ON CONFLICT are no way round
SELECT state FROM failure('MERGE INTO softmobile.outbox_event_1 e USING (SELECT 1) AS x ON true WHEN MATCHED THEN DELETE');
SELECT state FROM failure('INSERT INTO softmobile.outbox_event_1 SELECT * FROM softmobile.outbox_event_1 ON CONFLICT (lane_id, seq) DO UPDATE SET actor = ''other''');
-- only the worker's recycling empties a segment, and only one that is all delivered and old
SELECT softmobile.recycle_segments('1 hour') IS NULL AS kept;
SELECT state, message FROM failure('SELECT softmobile.empty_segment(9)');
SELECT count(*) FROM softmobile.outbox_event;

-- priority: by entity type, unless attach() says otherwise
SELECT e, softmobile.default_priority(e), softmobile.entity_flag(e) FROM unnest('{sale, Sale, sale_return, inventory_movement, stock_move, repair_order, repair_order_part, user, role, permission, customer, supplier,
	purchase_order, transfer_order, store, backup, draft, anything, salesman, return}'::text[]) AS e;
-- a priority that changes while events wait opens an epoch: the older goes first
SELECT count(*) FROM softmobile.outbox_epoch;
SELECT softmobile.detach('supplier');
SELECT softmobile.attach('supplier', 'supplier', priority => 'high');
INSERT INTO supplier VALUES (2);
SELECT epoch_no % 2 AS registered, why, registered FROM softmobile.outbox_epoch ORDER BY epoch_no;
SELECT entity, id, lane FROM events WHERE entity = 'supplier' ORDER BY (SELECT epoch_no FROM softmobile.outbox_lane l JOIN softmobile.outbox_event e USING (lane_id) WHERE e.id = event);
SELECT branch_id, entity_type, priority, total, pending FROM softmobile.sync_outbox_stats WHERE entity_type = 'supplier' ORDER BY 3;
-- the same priority again opens none
SELECT softmobile.detach('supplier'), softmobile.attach('supplier', 'supplier', priority => 'HIGH');
SELECT softmobile.detach('supplier'), softmobile.attach('supplier', 'supplier');
SELECT count(*) FROM softmobile.outbox_epoch;

-- a dump that brings the epoch that this installation has just opened: the one that is here moves up, with its lanes
BEGIN;
INSERT INTO supplier VALUES (3);
INSERT INTO softmobile.outbox_epoch SELECT e.epoch_no, gen_random_uuid(), e.registered, e.opened_at, 'from the dump' FROM softmobile.outbox_epoch e
WHERE e.why = 'priority of supplier changed' ORDER BY e.epoch_no;
INSERT INTO supplier VALUES (4);
SELECT why, registered, (SELECT count(*) FROM softmobile.outbox_lane l WHERE l.epoch_no = e.epoch_no AND branch_id IS NOT DISTINCT FROM CASE WHEN registered THEN 'S1' END) AS lanes
FROM softmobile.outbox_epoch e ORDER BY epoch_no;
SELECT count(DISTINCT lane_id) AS one_lane FROM softmobile.outbox_event WHERE entity_id IN ('3', '4');
ROLLBACK;

-- a branch that is not registered (in one transaction, for the worker would register it)
BEGIN;
INSERT INTO sale VALUES (3, 'S9', 1), (4, 'S8', 1);
SELECT l.branch_id AS lane_of, e.branch_id, l.priority FROM softmobile.outbox_event e JOIN softmobile.outbox_lane l USING (lane_id) WHERE e.entity_id IN ('3', '4') ORDER BY e.branch_id;
SELECT branch_id, entity_id, status FROM softmobile.sync_outbox WHERE branch_id LIKE 'S_' AND branch_id > 'S1' ORDER BY 1;
SELECT branch_id, total, pending FROM softmobile.sync_outbox_stats WHERE branch_id > 'S1' ORDER BY 1;
-- registered now: what waits is delivered through lanes of the branch, before its own; nothing is counted twice
SELECT softmobile.register_branch('S9', 'Nuevo');
INSERT INTO sale VALUES (5, 'S9', 1);
SELECT branch_id, entity_id, status FROM softmobile.sync_outbox WHERE branch_id > 'S1' ORDER BY 1, 2;
SELECT branch_id, total, pending FROM softmobile.sync_outbox_stats WHERE branch_id > 'S1' ORDER BY 1;
SELECT l.branch_id, e.entity_id, l.lane_id <> l.log_id AS adopted FROM softmobile.outbox_lane l JOIN softmobile.outbox_event e ON e.lane_id = l.log_id AND coalesce(e.branch_id, 'S9') = 'S9'
WHERE l.branch_id = 'S9' ORDER BY l.epoch_no, e.seq;
ROLLBACK;

-- existing rows: asked for with attach(), for each table of a tree that holds any
CREATE TABLE old (id integer PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE old_1 PARTITION OF old FOR VALUES FROM (0) TO (10);
CREATE TABLE old_2 PARTITION OF old FOR VALUES FROM (10) TO (20);
CREATE TABLE old_3 PARTITION OF old FOR VALUES FROM (20) TO (30);
INSERT INTO old VALUES (1), (2), (11);
BEGIN;
SELECT softmobile.attach('old', 'old', initial => 'snapshot');
SELECT relation, next_block, end_block, root, actor = current_user AS mine, reason FROM softmobile.outbox_snapshot ORDER BY 1;
-- what the worker does with it
SELECT count(*) FROM fresh();
SELECT softmobile.snapshot_step(100), softmobile.snapshot_step(100) \g /dev/null
SELECT op, lane, id, reason, payload FROM fresh();
SELECT operation, priority, status FROM softmobile.sync_outbox WHERE entity_type = 'old' LIMIT 1;
SELECT count(*) FROM softmobile.outbox_snapshot;
ROLLBACK;
-- detached or dropped before it was done: forgotten
BEGIN;
SELECT softmobile.attach('old', 'old', initial => 'snapshot');
DROP TABLE old_1;
SELECT relation FROM softmobile.outbox_snapshot;
SELECT softmobile.detach('old');
SELECT count(*) FROM softmobile.outbox_snapshot;
ROLLBACK;

-- as the table's owner, for a column's type may have a cast to json, and that is the owner's code
CREATE ROLE regress_owner;
BEGIN;
GRANT ALL ON SCHEMA shop TO regress_owner;
SET ROLE regress_owner;
CREATE TYPE spy AS ENUM ('x');
CREATE FUNCTION spy_json(spy) RETURNS json LANGUAGE sql AS 'SELECT to_json(current_user)';
CREATE CAST (spy AS json) WITH FUNCTION spy_json(spy);
CREATE TABLE spied (id integer PRIMARY KEY, s spy);
INSERT INTO spied VALUES (1, 'x');
RESET ROLE;
SELECT softmobile.attach('spied', 'spied', initial => 'snapshot');
SELECT softmobile.snapshot_step(1) \g /dev/null
SELECT op, payload, actor = current_user AS mine FROM events WHERE entity = 'spied';
SELECT current_user = session_user AS myself_again;
ROLLBACK;
DROP ROLE regress_owner;

-- calls that change the queue, without a worker that would have anything to do
SELECT softmobile.requeue_failed_outbox_entries(), softmobile.requeue_failed_outbox_entries('S1', '0'), softmobile.resend('S1', 'high', '{[1,5]}', 'lost at headquarters');
SELECT c.n, f.* FROM unnest(ARRAY[
	$$SELECT softmobile.requeue_failed_outbox_entries('nix')$$,
	$$SELECT softmobile.requeue_failed_outbox_entries(NULL, '-1 s')$$,
	$$SELECT softmobile.sync_outbox_retry('{}', 'a good reason')$$,
	$$SELECT softmobile.sync_outbox_retry(NULL, 'a good reason')$$,
	$$SELECT softmobile.sync_outbox_retry('{NULL}', 'a good reason')$$,
	$$SELECT softmobile.sync_outbox_retry('{00000000-0000-7000-8000-000000000000}', 'a good reason')$$,
	$$SELECT softmobile.sync_outbox_retry('{00000000-0000-7000-8000-000000000000}', 'abc')$$,
	$$SELECT softmobile.resend('nix', 'high', '{[1,2]}', 'a good reason')$$,
	$$SELECT softmobile.resend(NULL, 'high', '{[1,2]}', 'a good reason')$$,
	$$SELECT softmobile.resend('S1', 'urgent', '{[1,2]}', 'a good reason')$$,
	$$SELECT softmobile.resend('S1', NULL, '{[1,2]}', 'a good reason')$$,
	$$SELECT softmobile.resend('S1', 'high', '{}', 'a good reason')$$,
	$$SELECT softmobile.resend('S1', 'high', NULL, 'a good reason')$$,
	$$SELECT softmobile.resend('S1', 'high', '{[1,2]}', 'abc')$$,
	$$SELECT softmobile.resend('S1', 'high', '{[1,2]}', 'a good reason', '00000000-0000-7000-8000-000000000000')$$]) WITH ORDINALITY AS c (command, n), failure(c.command) AS f ORDER BY 1 \gx
RESET softmobile.reason;
SELECT * FROM failure($$SELECT softmobile.sync_outbox_retry(array(SELECT id FROM softmobile.sync_outbox LIMIT 1))$$) \gx
-- a retry of what waits anyway: in one transaction, for the worker would take the request
BEGIN;
SELECT entity_type, status, attempt_count FROM softmobile.sync_outbox_retry(array(SELECT id FROM softmobile.sync_outbox WHERE entity_type = 'store'), '  asked by the manager ');
SELECT kind, cardinality(ids), reason FROM softmobile.outbox_request;
SELECT action, reason, events, session_user_name = session_user AS me, current_user_name = current_user AS and_me FROM softmobile.sync_audit ORDER BY id DESC LIMIT 1;
SELECT current_setting('softmobile.reason') = '' AS reason_not_left_behind;
ROLLBACK;

-- rights: nothing for PUBLIC but its reason
CREATE ROLE regress_nobody;
CREATE ROLE regress_app;
CREATE ROLE regress_operator;
CREATE ROLE regress_auditor;
CREATE ROLE regress_worker;
SELECT softmobile.grant_role('regress_app', 'app'), softmobile.grant_role('regress_operator', 'operator'), softmobile.grant_role('regress_auditor', 'auditor'),
	softmobile.grant_role('regress_worker', 'worker');
SELECT * FROM failure($$SELECT softmobile.grant_role('regress_none', 'app')$$) \gx
SELECT * FROM failure($$SELECT softmobile.grant_role(NULL, 'app')$$) \gx
SELECT * FROM failure($$SELECT softmobile.grant_role('regress_app', 'boss')$$) \gx
-- (a line each, so that a new right is a new line)
\pset format unaligned
SELECT r.rolname, p.proname AS may_call
FROM pg_roles r, pg_proc p WHERE r.rolname LIKE 'regress\_%' AND p.pronamespace = 'softmobile'::regnamespace AND has_function_privilege(r.oid, p.oid, 'EXECUTE')
	AND (r.rolname = 'regress_nobody' OR NOT has_function_privilege('regress_nobody', p.oid, 'EXECUTE'))
ORDER BY 1, 2;
SELECT r.rolname, c.relname AS may_read
FROM pg_roles r, pg_class c WHERE r.rolname IN ('regress_app', 'regress_operator', 'regress_auditor', 'regress_nobody') AND c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'v')
	AND has_table_privilege(r.oid, c.oid, 'SELECT')
ORDER BY 1, 2;
SELECT r.rolname, c.relname AS may_write
FROM pg_roles r, pg_class c WHERE r.rolname IN ('regress_app', 'regress_operator', 'regress_auditor', 'regress_nobody') AND c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'v')
	AND has_table_privilege(r.oid, c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
ORDER BY 1, 2;
\pset format aligned
-- what they may, they can
GRANT USAGE ON SCHEMA shop TO regress_app, regress_operator, regress_auditor, regress_nobody;
SET ROLE regress_app;
SELECT count(o) > 0 FROM softmobile.sync_outbox_stats AS o;
SELECT count(*) FROM softmobile.sync_history;
SELECT count(id) > 0 AS events FROM softmobile.sync_outbox;
SELECT state, message FROM failure('SELECT payload FROM softmobile.sync_outbox');
SELECT state, message FROM failure($$SELECT softmobile.resend('S1', 'high', '{[1,2)}', 'try to replay')$$);
SET ROLE regress_operator;
SELECT count(o) > 0 FROM softmobile.sync_outbox AS o;
SELECT count(*) > 0 FROM softmobile.sync_audit;
SELECT softmobile.requeue_failed_outbox_entries();
BEGIN;
SELECT softmobile.register_branch('S7', 'of the operator');
SELECT registered_by FROM softmobile.branch WHERE branch_id = 'S7';
SELECT entity_type FROM softmobile.sync_outbox_retry(array(SELECT id FROM softmobile.sync_outbox WHERE entity_type = 'store'), 'asked by the manager');
SELECT current_user_name FROM softmobile.sync_audit ORDER BY id DESC LIMIT 1;
ROLLBACK;
SELECT state, message FROM failure($$SELECT softmobile.attach('shop.sale', 'x')$$);
SELECT state, message FROM failure('SELECT softmobile.open_epoch(''x'')');
SET ROLE regress_auditor;
SELECT count(o) > 0 FROM softmobile.sync_outbox AS o;
SELECT count(*) FROM softmobile.outbox_batch;
SELECT state, message FROM failure('SELECT softmobile.requeue_failed_outbox_entries()');
SET ROLE regress_nobody;
SELECT state, message FROM failure('SELECT * FROM softmobile.sync_outbox_stats');
SELECT state, message FROM failure('SELECT softmobile.sync_run()');
SELECT state, message FROM failure('CREATE TABLE softmobile.x ()');
RESET ROLE;
SET client_min_messages = warning;
DROP OWNED BY regress_nobody, regress_app, regress_operator, regress_auditor, regress_worker;
DROP ROLE regress_nobody, regress_app, regress_operator, regress_auditor, regress_worker;

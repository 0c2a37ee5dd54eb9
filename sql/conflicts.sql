-- Conflicts at the branch: what they look like, and how they are decided.
-- Each decision is taken in a transaction that is rolled back, for the worker would take the request.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE item (id integer PRIMARY KEY, store text NOT NULL DEFAULT 'S1', name text, price numeric(10,2), tags text[], at timestamptz, folio text,
	twice numeric GENERATED ALWAYS AS (price * 2) STORED, no bigint GENERATED ALWAYS AS IDENTITY);
SELECT softmobile.attach('item', 'item', branch_column => 'store', folio_column => 'folio');

-- The newest event of an entity comes back as a conflict, with this row of central's; what came later of it waits.
CREATE FUNCTION conflict(entity text, central jsonb, detail text DEFAULT 'headquarters holds other values of price') RETURNS uuid LANGUAGE sql AS $$
	INSERT INTO softmobile.outbox_exception (id, lane_id, seq, entity_no, entity_id, op, branch_id, created_at, actor, reason, folio, amount, payload, kind, state, error_message, central_row, attempt_count, last_attempt_at)
	SELECT e.id, e.lane_id, e.seq, e.entity_no, e.entity_id, e.op, l.branch_id, e.created_at, e.actor, e.reason, e.folio, e.amount, e.payload, 'conflict', 'failed', concat_ws(': ', 'conflict', detail), central, 1, now()
	FROM softmobile.outbox_event e JOIN softmobile.outbox_lane l USING (lane_id) WHERE e.entity_id = entity ORDER BY e.seq DESC LIMIT 1
	RETURNING id
$$;
CREATE FUNCTION waiter(entity text, behind uuid, OUT id uuid) LANGUAGE plpgsql AS $$
BEGIN
	id := conflict(entity, NULL);
	UPDATE softmobile.outbox_exception x SET kind = 'waiting', waits_for = behind, error_message = 'waits for ' || behind WHERE x.id = waiter.id;
END $$;
CREATE VIEW side_by_side AS
SELECT entity_id AS entity, operation, field, old_value, local_value, central_value, folio, reason, actor = current_user AS mine, detail, created_at <= detected_at AS in_order FROM softmobile.sync_conflicts ORDER BY id, field;
-- What a decision did: its answer, the row, the event, the request, the audit.
CREATE PROCEDURE decide(id uuid, resolution text, reason text DEFAULT 'asked the manager') LANGUAGE plpgsql AS $$
DECLARE
	r softmobile.conflict_resolution;
	e record;
	q softmobile.outbox_request;
	a record;
BEGIN
	PERFORM fresh();
	r := softmobile.resolve_conflict(id, resolution, reason);
	RAISE NOTICE 'answer: % % %/% %, columns %, waiting %, reason "%": %', r.resolution, r.entity_type, r.branch_id, r.entity_id, concat_ws(' ', r.change, r.table_name), r.columns, r.waiting, r.reason, r.what_follows;
	RAISE NOTICE 'row: %', (SELECT to_jsonb(i) - 'no' FROM item i WHERE i.id::text = r.entity_id);
	FOR e IN SELECT f.*, f.event = r.adoption AS is_adoption FROM fresh() f LOOP
		RAISE NOTICE 'event: % % % "%" adoption % %', e.op, e.entity, e.id, e.reason, e.is_adoption, regexp_replace(e.payload::text, ',"no":\d+', '', 'g');
	END LOOP;
	SELECT * INTO STRICT q FROM softmobile.outbox_request;
	RAISE NOTICE 'request: % % % "%", about it %, adoption %', q.kind, q.branch_id, q.resolution, q.reason, q.ids = ARRAY[decide.id], q.adoption = r.adoption;
	SELECT * INTO a FROM softmobile.sync_audit x ORDER BY x.id DESC LIMIT 1;
	RAISE NOTICE 'audit: % % "%", about it %, by me %, % % %', a.action, a.branch_id, a.reason, a.ids = ARRAY[decide.id], (a.current_user_name = current_user, a.session_user_name = session_user), a.details ->> 'resolution', a.details ->> 'change', a.details ->> 'columns';
	RAISE NOTICE 'reason left behind: %', current_setting('softmobile.reason');
END $$;

INSERT INTO item (id, name, price, at, folio) SELECT i, 'phone', 10, '2025-11-24 08:00+00', 'F-' || i FROM generate_series(1, 9) i;
UPDATE item SET price = 11, name = 'Phone ñ' WHERE id = 1;
UPDATE item SET price = 12 WHERE id = 2;
DELETE FROM item WHERE id = 3;
SELECT conflict('1', '{"id": 1, "store": "S1", "name": "smartphone", "price": 9.5, "tags": ["a", "b"], "at": "2025-11-24T09:00:00+00:00", "folio": "F-1", "twice": 19, "no": 1, "unknown": true}') AS one \gset
SELECT conflict('2', 'null', 'headquarters holds the row as deleted') AS two \gset
SELECT conflict('3', '{"id": 3, "store": "S1", "name": "phone", "price": 13, "at": "2025-11-24T08:00:00+00:00", "folio": "F-3"}') AS three \gset
SELECT conflict('4', NULL, '') AS four \gset
SELECT conflict('5', '{"id": 5, "price": 10.00, "name": "phone", "store": "S1", "tags": null, "at": "2025-11-24T08:00:00+00:00", "folio": "F-5", "twice": 20.00, "no": 5}') AS five \gset

-- side by side: a field each, or the whole row where one side has deleted it; what central has not told; nothing that differs any more
SELECT * FROM side_by_side \gx
-- what somebody has decided is no open question any more
BEGIN;
CALL decide(:'two', 'local');
SELECT DISTINCT entity FROM side_by_side ORDER BY 1;
ROLLBACK;

-- for the branch
BEGIN;
UPDATE item SET price = 14 WHERE id = 1;
SELECT waiter('1', :'one') \g /dev/null
CALL decide(:'one', 'local', '  more recent here ');
ROLLBACK;
-- for central: an update of what differs, as the types of the table want it; generated and identity columns as they are
BEGIN;
UPDATE item SET price = 14 WHERE id = 1;
SELECT waiter('1', :'one') \g /dev/null
CALL decide(:'one', 'central');
ROLLBACK;
-- ... a delete, of a row that was changed once more since
BEGIN;
UPDATE item SET price = 14 WHERE id = 2;
CALL decide(:'two', 'central');
ROLLBACK;
-- ... an insert, with defaults for what central does not hold
BEGIN;
CALL decide(:'three', 'central');
ROLLBACK;
-- ... of a row that is there again: an update
BEGIN;
INSERT INTO item (id, name, price, at, folio) VALUES (3, 'tablet', 1, '2025-11-24 10:00+00', 'F-3');
CALL decide(:'three', 'central');
ROLLBACK;
-- ... where nothing differs: captured all the same
BEGIN;
CALL decide(:'five', 'central');
ROLLBACK;
-- in any session: time zone, date style, search_path, an operator planted in the way
BEGIN;
CREATE FUNCTION shop.trap(integer, integer) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'trapped'; END $$;
CREATE OPERATOR shop.= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = shop.trap);
CREATE FUNCTION shop.path() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE NOTICE 'the trigger''s search_path: %', current_setting('search_path'); RETURN new; END $$;
CREATE TRIGGER path BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION path();
SET LOCAL TimeZone = 'America/Mexico_City';
SET LOCAL DateStyle = 'German';
SET LOCAL search_path = shop, pg_catalog;
SELECT change, columns FROM softmobile.resolve_conflict(:'one', 'central', 'asked the manager');
SET LOCAL search_path = shop;
SELECT at AT TIME ZONE 'UTC' AS at, tags FROM item WHERE name = 'smartphone';
ROLLBACK;
-- a trigger that stamps each change: the row differs from central's, and stands
BEGIN;
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN new.at := '2026-01-01 00:00+00'; RETURN new; END $$;
CREATE TRIGGER stamp BEFORE UPDATE ON item FOR EACH ROW EXECUTE FUNCTION stamp();
CALL decide(:'one', 'central');
ROLLBACK;

-- the reason in force serves too, and named arguments
BEGIN;
SELECT reason FROM softmobile.resolve_conflict(id => :'two', resolution => 'local', reason => NULL);
ROLLBACK;

-- other tables: two keys, key names to be quoted, partitions, inheritance, several tables of one entity type
BEGIN;
CREATE TABLE "Stock" ("Store" text, "sku no" integer, n integer, PRIMARY KEY ("Store", "sku no")) PARTITION BY LIST ("Store");
CREATE TABLE stock_1 PARTITION OF "Stock" FOR VALUES IN ('S1');
CREATE TABLE stock_2 PARTITION OF "Stock" DEFAULT;
SELECT softmobile.attach('"Stock"', 'stock', branch_column => 'Store');
INSERT INTO "Stock" VALUES ('S1', 7, 1), ('S2', 7, 5);
UPDATE "Stock" SET n = 2 WHERE "sku no" = 7;
SELECT conflict('["S1",7]', '{"Store": "S1", "sku no": 7, "n": 3}') AS stock \gset
SELECT table_name, change, columns FROM softmobile.resolve_conflict(:'stock', 'central', 'asked the manager');
SELECT tableoid::regclass, * FROM "Stock" ORDER BY 2;
CREATE TABLE base (id integer PRIMARY KEY, a text);
CREATE TABLE derived (b text) INHERITS (base);
SELECT softmobile.attach('base', 'thing');
INSERT INTO derived VALUES (1, 'a', 'b');
SELECT conflict('1', '{"id": 1, "a": "A", "b": "B"}') AS thing \gset
CREATE TABLE other (id integer PRIMARY KEY, c text);
SELECT softmobile.attach('other', 'thing');
SELECT table_name, change, columns FROM softmobile.resolve_conflict(:'thing', 'central', 'asked the manager');
SELECT * FROM derived;
CREATE TABLE third (LIKE derived);
SELECT softmobile.attach('third', 'thing', key => '{id}');
INSERT INTO third VALUES (9, 'a', 'b');
SELECT conflict('9', '{"id": 9}') AS thing \gset
SELECT state, replace(message, :'thing', '<id>') AS message, detail, hint FROM failure(format('SELECT softmobile.resolve_conflict(%L, ''central'', ''asked the manager'')', :'thing')) \gx
ROLLBACK;

-- the same key in rows of other branches
BEGIN;
CREATE TABLE cash (no integer, store text, total numeric);
SELECT softmobile.attach('cash', 'cash', key => '{no}', branch_column => 'store');
INSERT INTO cash VALUES (1, 'S2', 5), (1, 'S1', 6);
SELECT conflict('1', '{"no": 1, "store": "S1", "total": 7}') AS cash \gset
SELECT change FROM softmobile.resolve_conflict(:'cash', 'central', 'asked the manager');
SELECT * FROM cash ORDER BY store;
INSERT INTO cash VALUES (1, 'S1', 8);
DELETE FROM softmobile.outbox_request;
SELECT state, message, hint FROM failure(format('SELECT softmobile.resolve_conflict(%L, ''central'', ''asked the manager'')', :'cash'));
ROLLBACK;

-- what cannot be decided
INSERT INTO item (id, name) VALUES (20, 'waits'), (21, 'refused');
SELECT waiter('20', :'one') AS waits \gset
SELECT conflict('21', NULL) AS refused \gset
UPDATE softmobile.outbox_exception SET kind = 'rejected', error_message = 'rejected: no such shop' WHERE id = :'refused';
SELECT event AS plain FROM events WHERE id = '9' \gset
PREPARE decision (uuid, text, text) AS SELECT softmobile.resolve_conflict($1, $2, $3);
SELECT c.n, replace(replace(f.state || ' ' || f.message, i.id, '<id>'), :'one', '<one>') AS message, replace(replace(f.detail, :'one', '<one>'), i.id, '<id>') AS detail, f.hint
FROM (VALUES (1, :'one', 'theirs', 'a good reason'), (2, :'one', NULL, 'a good reason'), (3, :'one', 'local', 'abc'), (4, '00000000-0000-7000-8000-000000000000', 'local', 'a good reason'),
	(5, NULL, 'local', 'a good reason'), (6, :'plain', 'local', 'a good reason'), (7, :'waits', 'local', 'a good reason'), (8, :'refused', 'central', 'a good reason'), (9, :'four', 'central', 'a good reason')) AS c (n, id, resolution, reason)
	CROSS JOIN LATERAL failure(format('SELECT softmobile.resolve_conflict(%L, %L, %L)', c.id, c.resolution, c.reason)) AS f CROSS JOIN LATERAL (SELECT coalesce(c.id, 'NULL')) AS i (id) ORDER BY 1 \gx
DEALLOCATE decision;
CREATE FUNCTION refusal(id uuid, resolution text DEFAULT 'central', OUT state text, OUT message text, OUT detail text, OUT hint text) LANGUAGE sql AS $$
	SELECT f.state, replace(f.message, id::text, '<id>'), regexp_replace(f.detail, 'by .* at .*:', 'by <whom> at <when>:'), f.hint FROM failure(format('SELECT softmobile.resolve_conflict(%L, %L, %L)', id, resolution, 'asked the manager')) AS f
$$;
-- twice: asked for in this transaction; taken by the worker
BEGIN;
SELECT softmobile.resolve_conflict(:'two', 'local', 'the first decision') \g /dev/null
SELECT * FROM refusal(:'two') \gx
DELETE FROM softmobile.outbox_request;
UPDATE softmobile.outbox_exception SET state = 'queued', resolution = 'local' WHERE id = :'two';
SELECT * FROM refusal(:'two', 'local') \gx
UPDATE softmobile.outbox_exception SET state = 'delivered';
SELECT * FROM refusal(:'two') \gx
ROLLBACK;
-- the row is gone, or another; the table; the key; the columns; the capture; the right to change it
BEGIN;
DELETE FROM item WHERE id = 1;
SELECT * FROM refusal(:'one') \gx
ROLLBACK;
BEGIN;
UPDATE item SET id = 100 WHERE id = 1;
SELECT * FROM refusal(:'one') \gx
ROLLBACK;
BEGIN;
UPDATE item SET store = 'S2' WHERE id = 2;
SELECT * FROM refusal(:'two') \gx
ROLLBACK;
BEGIN;
SELECT softmobile.detach('item');
SELECT * FROM refusal(:'one') \gx
DROP TABLE item CASCADE;
SELECT state, message FROM refusal(:'one');
SELECT resolution FROM softmobile.resolve_conflict(:'one', 'local', 'asked the manager');
ROLLBACK;
BEGIN;
SELECT softmobile.detach('item'), softmobile.attach('item', 'item', key => '{folio}', branch_column => 'store');
SELECT * FROM refusal(:'one') \gx
ROLLBACK;
BEGIN;
UPDATE softmobile.outbox_exception SET central_row = '{"other": 1}';
SELECT state, message, hint FROM refusal(:'one');
UPDATE softmobile.outbox_exception SET central_row = '["other"]';
SELECT state, message, hint FROM refusal(:'one');
UPDATE softmobile.outbox_exception SET central_row = '{"id": 1, "no": 1000}';
SELECT state, message FROM refusal(:'one');
UPDATE softmobile.outbox_exception SET central_row = '{"id": 1, "price": "dear"}';
SELECT state, message FROM refusal(:'one');
UPDATE softmobile.outbox_exception SET central_row = '{"id": 101, "price": 1}';
SELECT state, message, detail FROM refusal(:'one');
UPDATE softmobile.outbox_exception SET central_row = '{"id": 1, "store": "S3"}';
SELECT state, message FROM refusal(:'one');
ROLLBACK;
BEGIN;
SET LOCAL softmobile.enable_hybrid_prep = off;
SELECT * FROM refusal(:'two') \gx
ROLLBACK;
BEGIN;
SET LOCAL session_replication_role = replica;
SELECT state FROM refusal(:'two');
ROLLBACK;
BEGIN;
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER nothing BEFORE DELETE ON item FOR EACH ROW EXECUTE FUNCTION nothing();
SELECT * FROM refusal(:'two') \gx
ROLLBACK;
-- nothing of all this was half done
SELECT count(*) FROM softmobile.outbox_request;
SELECT count(*) FROM softmobile.sync_audit WHERE action = 'resolve_conflict';
SELECT DISTINCT entity FROM side_by_side ORDER BY 1;

-- rights: an operator decides; to bring central's row into the table he needs rights on it
CREATE ROLE regress_operator;
CREATE ROLE regress_app;
SELECT softmobile.grant_role('regress_operator', 'operator'), softmobile.grant_role('regress_app', 'app');
GRANT USAGE ON SCHEMA shop TO regress_operator, regress_app;
BEGIN;
SET LOCAL ROLE regress_operator;
SELECT count(*) > 0 FROM softmobile.sync_conflicts;
SELECT resolution FROM softmobile.resolve_conflict(:'two', 'local', 'asked the manager');
SELECT current_user_name FROM softmobile.sync_audit WHERE action = 'resolve_conflict';
SELECT state, message FROM refusal(:'one');
SELECT state, message FROM failure(format('SELECT softmobile.record_resolution(%L, ''central'', ''no row changed'', NULL, NULL, NULL, %1$L)', :'one'));
SELECT state, message FROM failure(format('SELECT softmobile.conflict_to_resolve(%L, ''central'', ''just looking'')', :'one'));
RESET ROLE;
GRANT SELECT, UPDATE (price, name, tags, at) ON item TO regress_operator;
ALTER TABLE item ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON item USING (price < 11);
SET LOCAL ROLE regress_operator;
SELECT state, message FROM refusal(:'one');
RESET ROLE;
ALTER TABLE item DISABLE ROW LEVEL SECURITY;
UPDATE softmobile.outbox_exception SET central_row = central_row - 'no' WHERE id = :'one';
SET LOCAL ROLE regress_operator;
SELECT change, columns FROM softmobile.resolve_conflict(:'one', 'central', 'asked the manager');
RESET ROLE;
SELECT actor, reason FROM events WHERE id = '1' ORDER BY place DESC LIMIT 1;
SET LOCAL ROLE regress_app;
SELECT state, message FROM failure('SELECT * FROM softmobile.sync_conflicts');
SELECT state, message FROM refusal(:'five');
ROLLBACK;
DROP OWNED BY regress_operator, regress_app;
DROP ROLE regress_operator, regress_app;

-- the reason of automatic requeues, to the letter
SELECT softmobile.automatic_reason(), convert_to(softmobile.automatic_reason(), 'UTF8') = convert_to(U&'Reintento autom\00E1tico programado', 'UTF8') AS exact;

-- Reconciliation, as the branch sees it. Central is this very database: its half of the comparison is called in place of
-- HTTP, and arrive() makes it hold what the events say.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
CREATE TABLE wire (answer jsonb, meanwhile text, token bytea);
INSERT INTO wire (token) SELECT sha256(convert_to(softmobile.central_create_token('{S1,S2}', 'shop'), 'UTF8'));
CREATE TABLE asked (question json, answer jsonb);
CREATE OR REPLACE FUNCTION softmobile.ask_json(branch text, path text, question json) RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = shop, pg_temp AS $$
DECLARE
	l wire := (SELECT wire FROM wire);
	answer jsonb := coalesce(l.answer, softmobile.central_reconcile(question::text, l.token)::jsonb);
BEGIN
	IF answer = '"offline"' THEN
		RAISE EXCEPTION 'central cannot be reached: offline' USING ERRCODE = 'connection_failure';
	ELSIF jsonb_typeof(answer) = 'number' THEN
		RAISE EXCEPTION 'central answered %: too bad', answer USING ERRCODE = '08004';
	END IF;
	INSERT INTO asked VALUES (question, answer);
	IF l.meanwhile IS NOT NULL AND question ->> 'entity_type' = 'sale' THEN
		EXECUTE l.meanwhile;
	END IF;
	RETURN answer;
END
$$;
CREATE FUNCTION arrive() RETURNS void LANGUAGE sql AS $$
	INSERT INTO softmobile.central_projection AS p (branch_id, entity_type, entity_id, seq, changed_at, epoch_no, deleted, changed_here, row)
	SELECT DISTINCT ON (branch, entity, id) branch, entity, id, place, now(), 1, op = 'd', false, payload::jsonb -> 'new' FROM events ORDER BY branch, entity, id, place DESC
	ON CONFLICT (branch_id, entity_type, entity_id) DO UPDATE SET seq = excluded.seq, deleted = excluded.deleted, row = excluded.row WHERE p.seq < excluded.seq;
	UPDATE softmobile.outbox_lane l SET settled = (SELECT range_agg(int8range(e.seq, e.seq + 1)) FROM softmobile.outbox_event e WHERE e.lane_id = l.log_id)
	WHERE EXISTS (SELECT FROM softmobile.outbox_event e WHERE e.lane_id = l.log_id);
$$;
-- What differs, without the moments.
CREATE FUNCTION differences(first date DEFAULT '2026-01-01', last date DEFAULT '2026-12-31', branch text DEFAULT 'S1')
	RETURNS TABLE (kind text, entity text, id text, folio text, sku text, local jsonb, central jsonb, detail text) LANGUAGE sql AS $$
	SELECT kind, entity_type, entity_id, folio, sku, local, central, regexp_replace(detail, 'since [-0-9]+ [:0-9]+ UTC', 'since T')
	FROM softmobile.reconcile(branch, first, last) ORDER BY kind COLLATE "C", entity_type, entity_id, folio COLLATE "C"
$$;
-- What nobody captures: the other side does not hear of it.
CREATE FUNCTION secretly(command text) RETURNS void LANGUAGE plpgsql SET session_replication_role = replica AS $$ BEGIN EXECUTE command; END $$;
\set ECHO all
SET softmobile.reason = 'regression test';
SELECT softmobile.register_branch('S2', 'Norte');

-- bad input
SELECT r.b, r.f, r.t, failure.* FROM (VALUES (NULL, '2026-01-01'::date, '2026-01-31'::date), ('S9', '2026-01-01', '2026-01-31'), ('S1', NULL, '2026-01-31'), ('S1', '2026-01-01', NULL),
	('S1', '2026-01-31', '2026-01-01'), ('S1', '-infinity', '2026-01-31'), ('S1', '2026-01-01', 'infinity'), ('S1', '2026-01-01', '10000-01-01'), ('S1', '0001-12-31 BC', '2026-01-01'), ('S1', '2026-01-01', '2026-01-31')) AS r (b, f, t)
	CROSS JOIN LATERAL failure(format('SELECT softmobile.reconcile(%L, %L, %L)', r.b, r.f, r.t)) \gx
BEGIN READ ONLY;
SELECT state, message, hint FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-01-31')$$);
ROLLBACK;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT state, message, hint FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-01-31')$$);
ROLLBACK;

-- sales by folio and amount in a range of dates, stock by SKU and quantity as it is now
CREATE TABLE sale (id bigint PRIMARY KEY, store text, origin text, folio text, total numeric(12, 2), sold_at timestamptz, note text);
CREATE TABLE stock (store text, sku text, shelf int, quantity int, PRIMARY KEY (store, sku, shelf));
SELECT softmobile.attach('sale', 'sale', branch_column => 'store', branch_fallback_column => 'origin', folio_column => 'folio', amount_column => 'total', date_column => 'sold_at'),
	softmobile.attach('stock', 'inventory', branch_column => 'store', sku_column => 'sku', quantity_column => 'quantity');
INSERT INTO sale SELECT i, 'S1', NULL, 'A-' || lpad(i::text, 4, '0'), i * 1.5, timestamptz '2026-01-01 00:00:00+00' + (i - 1) * interval '1 hour' FROM generate_series(1, 720) AS i;
INSERT INTO stock SELECT 'S1', 'SKU' || i, 1, i FROM generate_series(1, 50) AS i;
SELECT arrive();
SELECT count(*) FROM softmobile.reconcile('S1', '2026-01-01', '2026-12-31');
SELECT mode, status, triggered_by = current_user AS mine, finished_at >= started_at AS ended, processed_events, differences_detected, error_message FROM softmobile.sync_history;
-- the question
SELECT jsonb_pretty(question::jsonb - 'counts' - 'digests'), (SELECT sum(n::int) FROM json_array_elements_text(question -> 'counts') AS n), json_array_length(question -> 'digests'),
	answer FROM asked WHERE question ->> 'entity_type' = 'sale' \gx

-- each kind of difference
SELECT secretly($$UPDATE sale SET total = total + 1 WHERE id = 5$$), secretly($$UPDATE sale SET folio = 'B-6' WHERE id = 6$$), secretly($$UPDATE sale SET note = 'not compared' WHERE id = 8$$),
	secretly($$DELETE FROM sale WHERE id IN (17, 18)$$),
	secretly($$INSERT INTO sale VALUES (2001, 'S1', NULL, 'A-0723', 5, '2026-01-05'), (2002, NULL, 'S1', 'A-0007', 5, '2026-01-05'), (2003, ' S1 ', NULL, NULL, NULL, '2026-01-05')$$),
	secretly($$UPDATE sale SET id = 3000 WHERE id = 40$$),
	secretly($$UPDATE stock SET quantity = 0 WHERE sku = 'SKU3'$$), secretly($$INSERT INTO stock VALUES ('S1', 'SKU51', 2, 1)$$);
SELECT * FROM differences() \gx
-- found again, they are the same
SELECT count(*) FROM softmobile.reconcile('S1', '2026-01-01', '2026-12-31');
SELECT status, count(*), count(DISTINCT session_id) FROM softmobile.sync_discrepancy GROUP BY status;
SELECT mode, status, differences_detected FROM softmobile.sync_history ORDER BY id DESC LIMIT 1;

-- resolving
SELECT f.* FROM unnest('{"SELECT softmobile.resolve_discrepancy(NULL, ''recounted'')", "SELECT softmobile.resolve_discrepancy(-1, ''recounted'')", "SELECT softmobile.resolve_discrepancy(id, ''no'') FROM softmobile.sync_discrepancy"}'::text[]) AS c (command), failure(c.command) AS f \gx
SET softmobile.reason = '';
SELECT state, message, hint FROM failure('SELECT softmobile.resolve_discrepancy(id) FROM softmobile.sync_discrepancy');
SET softmobile.reason = 'regression test';
SELECT r.kind, r.folio, r.status, r.resolved_at IS NOT NULL AS resolved, r.resolved_by = current_user AS mine, r.reason
FROM softmobile.sync_discrepancy d CROSS JOIN LATERAL softmobile.resolve_discrepancy(d.id, '  paper jam, folios destroyed ') AS r WHERE d.kind = 'folio gap' ORDER BY d.folio;
SELECT count(*), min(reason), min(details ->> 'folio') FROM softmobile.sync_audit WHERE action = 'resolve_discrepancy';
SELECT state, regexp_replace(message, '\d+', 'N') AS message, regexp_replace(detail, ' at .* by .*:', ' at T by R:') AS detail, hint FROM failure($$SELECT softmobile.resolve_discrepancy(id, 'once more') FROM softmobile.sync_discrepancy WHERE kind = 'folio gap'$$);
-- what is resolved is not reported again, until it changes
SELECT count(*) FILTER (WHERE kind = 'folio gap') AS gaps, count(*) FROM differences();
SELECT secretly($$DELETE FROM sale WHERE id = 19$$);
SELECT id, folio, local, detail FROM differences() WHERE kind = 'folio gap';
-- what no longer differs is gone
SELECT secretly($$UPDATE sale SET total = total - 1 WHERE id = 5$$), secretly($$DELETE FROM sale WHERE id IN (2001, 2002, 2003)$$), secretly($$DELETE FROM stock WHERE shelf = 2$$);
SELECT count(*) FROM differences();
SELECT kind, entity_id, folio, sku, resolved_at IS NOT NULL AS since, resolved_by, reason FROM softmobile.sync_discrepancy WHERE status = 'gone' ORDER BY kind COLLATE "C", entity_type, entity_id, folio;
SELECT action, branch_id, reason, jsonb_array_length(details -> 'discrepancies') AS gone, current_user_name = current_user AS mine FROM softmobile.sync_audit WHERE action = 'discrepancies_gone';
SELECT state, regexp_replace(message, '\d+', 'N') AS message FROM failure($$SELECT softmobile.resolve_discrepancy(id, 'once more') FROM softmobile.sync_discrepancy WHERE status = 'gone'$$);
-- it comes back as a new one
SELECT secretly($$UPDATE sale SET total = total + 1 WHERE id = 5$$);
SELECT id, detail FROM differences() WHERE id = '5';
SELECT status, count(*) FROM softmobile.sync_discrepancy WHERE entity_id = '5' GROUP BY status ORDER BY status;

-- dates are days in UTC, both included, whatever the session's time zone is
SET TimeZone = 'America/Mexico_City';
SELECT secretly($$UPDATE sale SET total = 0 WHERE id IN (24, 25, 48, 49)$$);
SELECT first, last, (SELECT string_agg(d.id, ' ' ORDER BY d.id) FROM differences(first, last) AS d WHERE d.id IN ('24', '25', '48', '49'))
FROM (VALUES ('2026-01-01'::date, '2026-01-01'::date), ('2026-01-02', '2026-01-02'), ('2026-01-02', '2026-01-03'), ('2026-02-01', '2026-02-28')) AS r (first, last);
-- another range finds nothing gone that it did not look at; a wider one does
SELECT secretly($$UPDATE sale SET total = id * 1.5 WHERE id IN (24, 25, 48, 49)$$);
SELECT count(*) FROM differences('2026-01-03', '2026-01-03');
SELECT entity_id, status FROM softmobile.sync_discrepancy WHERE entity_id IN ('24', '25', '48', '49') ORDER BY entity_id::int, status;
SELECT count(*) FROM differences('2025-12-01', '2026-01-31');
SELECT DISTINCT status FROM softmobile.sync_discrepancy WHERE entity_id IN ('24', '25', '48', '49');
RESET TimeZone;

-- a gap between two days is one of the second
SELECT secretly('DELETE FROM sale WHERE id = 73');
SELECT kind, folio FROM differences('2026-01-03', '2026-01-03') WHERE folio = 'A-0073';
SELECT kind, folio FROM differences('2026-01-04', '2026-01-04') WHERE folio = 'A-0073';
SELECT secretly($$INSERT INTO sale VALUES (73, 'S1', NULL, 'A-0073', 109.5, '2026-01-04')$$);
SELECT count(*) FROM differences('2026-01-04', '2026-01-04') WHERE folio = 'A-0073';

-- events that wait, and those that were settled while both sides were compared
UPDATE sale SET total = 100 WHERE id = 100;
UPDATE sale SET total = 101 WHERE id = 100;
INSERT INTO sale VALUES (721, 'S1', NULL, 'A-0721', 10, '2026-01-31');
DELETE FROM sale WHERE id = 200;
SELECT id, kind, detail FROM differences() WHERE id IN ('100', '721', '200');
UPDATE softmobile.outbox_lane l SET status = 'failed', batch = int8multirange(int8range(1, 100000)), attempt_count = 1, last_attempt_at = now(), error_message = 'offline'
WHERE branch_id = 'S1' AND EXISTS (SELECT FROM softmobile.outbox_event e WHERE e.lane_id = l.log_id);
SELECT id, kind, detail FROM differences() WHERE id IN ('100', '721', '200');
UPDATE softmobile.outbox_lane SET status = 'idle', batch = NULL WHERE branch_id = 'S1';
SELECT arrive();
SELECT count(*) FROM differences() WHERE id IN ('100', '721', '200');
UPDATE sale SET total = 1 WHERE id IN (101, 102, 103);
SELECT count(*) FROM differences() WHERE id IN ('101', '102', '103');
-- 103 goes on waiting; a wrong row of before stays open, neither found again nor gone
UPDATE wire SET meanwhile = $$
	INSERT INTO softmobile.outbox_batch (lane_id, kind, members, last_seq, events, settled_at)
	SELECT e.lane_id, 'sent', range_agg(int8range(e.seq, e.seq + 1)), max(e.seq), count(*), clock_timestamp()
	FROM softmobile.outbox_event e JOIN softmobile.outbox_entity t USING (entity_no) WHERE t.entity_type = 'sale' AND e.entity_id IN ('101', '102') GROUP BY e.lane_id$$;
SELECT id, kind FROM differences() WHERE id IN ('101', '102', '103');
SELECT entity_id, status FROM softmobile.sync_discrepancy WHERE entity_id IN ('101', '102', '103') ORDER BY entity_id;
UPDATE wire SET meanwhile = NULL;
SELECT id, kind FROM differences() WHERE id IN ('101', '102', '103');
SELECT arrive();

-- a change at headquarters; 10.5 is 10.50, where it is an amount
SELECT softmobile.central_change('S1', 'sale', '300', (SELECT row || '{"total": 450.0}' FROM softmobile.central_projection WHERE entity_type = 'sale' AND entity_id = '300'), 'typed by hand'),
	softmobile.central_change('S1', 'sale', '301', (SELECT row || '{"folio": "A-301"}' FROM softmobile.central_projection WHERE entity_type = 'sale' AND entity_id = '301'), 'typed by hand'),
	softmobile.central_change('S1', 'sale', '302', NULL, 'cancelled');
SELECT id, kind, detail FROM differences() WHERE id IN ('300', '301', '302');

-- central's trouble leaves nothing behind
SELECT count(*) AS before FROM softmobile.sync_history \gset
UPDATE wire SET answer = a FROM (VALUES ('"offline"'::jsonb)) AS v (a);
SELECT state, message FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$$);
UPDATE wire SET answer = '413';
SELECT * FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$$) \gx
UPDATE wire SET answer = '500';
SELECT state, message FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$$);
CREATE TABLE spoilt (answer jsonb);
INSERT INTO spoilt VALUES ('{}'), ('[]'), ('"ok"'), ('{"buckets": 1}'), ('{"buckets": [1]}'), ('{"buckets": [{"bucket": 1}]}'), ('{"buckets": [{"bucket": "1", "rows": []}]}'), ('{"buckets": [{"bucket": 4096, "rows": []}]}'),
	('{"buckets": [{"bucket": -1, "rows": []}]}'), ('{"buckets": [{"bucket": 0.5, "rows": []}]}'), ('{"buckets": [{"bucket": 0, "rows": [[]]}]}'), ('{"buckets": [{"bucket": 0, "rows": [{"entity_id": 1, "values": {}}]}]}'),
	('{"buckets": [{"bucket": 0, "rows": [{"entity_id": "1", "values": []}]}]}'), ('{"buckets": [{"bucket": 0, "rows": [{"values": {}}]}]}');
DO $$
DECLARE
	a jsonb;
	f record;
BEGIN
	FOR a IN SELECT answer FROM spoilt LOOP
		UPDATE wire SET answer = a;
		SELECT * INTO f FROM failure($q$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$q$);
		IF f.state <> '08P01' OR f.hint IS NULL THEN
			RAISE WARNING '%: % %', a, f.state, f.message;
		END IF;
	END LOOP;
END
$$;
UPDATE wire SET answer = NULL;
SELECT count(*) - :before AS sessions FROM softmobile.sync_history;

-- rows of one branch only; those without one belong to the setting's
INSERT INTO sale VALUES (5001, 'S2', NULL, 'Z-1', 1, '2026-03-01'), (5002, NULL, 'S2', 'Z-2', 1, '2026-03-01'), (5003, '', ' S2', 'Z-3', 1, '2026-03-01'), (5004, NULL, NULL, 'A-0722', 1, '2026-03-01');
SELECT arrive();
SELECT branch_id, entity_id FROM softmobile.central_projection WHERE entity_id LIKE '500_' ORDER BY 2;
SELECT * FROM differences('2026-03-01', '2026-03-01', 'S1');
SELECT * FROM differences('2026-03-01', '2026-03-01', 'S2');
SELECT secretly($$DELETE FROM sale WHERE id BETWEEN 5001 AND 5004$$);
SELECT kind, id, folio FROM differences('2026-03-01', '2026-03-01', 'S1');
SELECT kind, id, folio FROM differences('2026-03-01', '2026-03-01', 'S2');
CREATE TABLE receipt (id int PRIMARY KEY, folio int);
SELECT softmobile.detach('sale'), softmobile.detach('stock'), softmobile.attach('receipt', 'receipt', folio_column => 'folio');
SELECT state, message, detail FROM failure($$SELECT softmobile.reconcile('S2', '2026-01-01', '2026-12-31')$$);
SELECT count(*) FROM softmobile.reconcile('S1', '2026-01-01', '2026-12-31');
DROP TABLE sale, stock;

-- folios: numbers of any kind, none, too long ones, doubled ones
INSERT INTO receipt VALUES (1, 5), (2, 7), (3, 7), (4, NULL), (5, -3), (6, 8);
SELECT arrive();
SELECT kind, folio, local, detail FROM differences();
CREATE TABLE invoice (id int PRIMARY KEY, folio text);
SELECT softmobile.detach('receipt'), softmobile.attach('invoice', 'invoice', folio_column => 'folio');
INSERT INTO invoice SELECT row_number() OVER (), f FROM unnest('{A, A, "", A1, A3, A003, A0005, A5, B999, B1001, C1, D999999999999999999, D1, E9999999999999999999, E1, "Ñ 1", "Ñ 3", "F-1-1", "F-1-3", "F-2-2"}'::text[]) AS f;
INSERT INTO invoice SELECT 100 + i, 'G' FROM generate_series(1, 30) AS i;
INSERT INTO invoice SELECT 10000 + i, 'H' || 3 * i FROM generate_series(1, 3000) AS i;
SELECT arrive();
SELECT kind, folio, CASE WHEN jsonb_typeof(local) = 'array' THEN to_jsonb(jsonb_array_length(local)) ELSE local END AS local, detail FROM differences() WHERE folio !~ '^H' OR detail ~ 'gaps';
SELECT count(*) FROM softmobile.sync_discrepancy WHERE status = 'open' AND folio ~ '^H';
DROP TABLE receipt, invoice;

-- one entity type in several tables, a tree, children of their own, a key that is none
CREATE TABLE ticket (a int, b text, folio text, total int, at timestamp, PRIMARY KEY (a, b)) PARTITION BY RANGE (a);
CREATE TABLE ticket_1 PARTITION OF ticket FOR VALUES FROM (1) TO (100);
CREATE TABLE ticket_2 (extra int, total int, at timestamp, folio text, b text NOT NULL, a int NOT NULL);
ALTER TABLE ticket_2 DROP COLUMN extra;
ALTER TABLE ticket ATTACH PARTITION ticket_2 FOR VALUES FROM (100) TO (200);
CREATE TABLE old_ticket (n int, number text, money float8, at timestamp);
CREATE TABLE older_ticket () INHERITS (old_ticket);
SELECT softmobile.attach('older_ticket', 'ticket', key => '{n}', folio_column => 'number', amount_column => 'money', date_column => 'at'),
	softmobile.attach('old_ticket', 'ticket', key => '{n}', folio_column => 'number', amount_column => 'money', date_column => 'at'),
	softmobile.attach('ticket', 'ticket', folio_column => 'folio', amount_column => 'total', date_column => 'at');
INSERT INTO ticket VALUES (1, 'x "y"', 'T1', 1, '2026-01-01'), (100, 'ñ', 'T2', 2, '2026-01-31 23:59:59.999'), (101, '', 'T9', 3, '2026-02-01');
INSERT INTO old_ticket VALUES (7, 'T3', 0.1, '2026-01-02'), (NULL, 'T4', 1e20, '2026-01-03');
INSERT INTO older_ticket VALUES (8, 'T5', 1e-7, '2026-01-04'), (9, 'T6', 'NaN', '2026-01-05'), (10, 'T7', NULL, '2026-01-05'), (11, 'T8', 8, NULL);
SELECT arrive();
SELECT * FROM differences('2026-01-01', '2026-01-31');
SELECT secretly('UPDATE ticket SET total = 20 WHERE a = 100'), secretly('UPDATE older_ticket SET money = 2 WHERE n = 8'), secretly('UPDATE ONLY old_ticket SET number = NULL WHERE n IS NULL'),
	secretly($$INSERT INTO old_ticket VALUES (7, 'T3', 0.1, '2026-01-02')$$);
SELECT kind, id, folio, local, central, detail FROM differences('2026-01-01', '2026-01-31') \gx
-- tables that do not agree on the date are compared whole
SELECT softmobile.detach('ticket'), softmobile.attach('ticket', 'ticket', folio_column => 'folio', amount_column => 'total');
SELECT DISTINCT question ->> 'date_column' AS date_column, question ->> 'from' AS first, question ->> 'columns' AS columns FROM asked WHERE question ->> 'entity_type' = 'ticket' ORDER BY 1;
SELECT count(*) FROM differences('2030-01-01', '2030-01-01');
SELECT question ->> 'date_column' AS date_column, question ->> 'from' AS first FROM asked WHERE question ->> 'entity_type' = 'ticket' AND question ->> 'date_column' IS NULL;
-- a date column that became something else
SELECT softmobile.detach('ticket'), softmobile.detach('old_ticket');
ALTER TABLE old_ticket ALTER COLUMN at TYPE text;
SELECT * FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$$) \gx
DROP TABLE ticket, old_ticket CASCADE;

-- values are compared as the events show them, whatever the types are and whatever the session's settings
CREATE TYPE colour AS ENUM ('red', 'dark "red"');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE span AS RANGE (subtype = text);
CREATE DOMAIN money2 AS numeric(10, 2);
CREATE DOMAIN codes AS text[];
CREATE FUNCTION secret(colour) RETURNS json LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'this must not run as the owner of softmobile'; END $$;
CREATE TABLE types (type text PRIMARY KEY, value text);
INSERT INTO types VALUES ('int2', '7'), ('int8', '-9223372036854775808'), ('numeric', '1.500'), ('numeric(8,-2)', '12345'), ('float4', '1.1'), ('float8', '1e+30'), ('float8', '0.1') ON CONFLICT DO NOTHING;
INSERT INTO types VALUES ('bool', 'true'), ('text', E'a\tb"\\ñ'), ('varchar(5)', 'x'), ('char(6)', 'x'), ('"char"', 'x'), ('name', 'x'), ('uuid', '01890a5d-ac96-774b-bcce-b302099a8057'), ('bytea', '\x00ff'), ('date', '2026-02-03'),
	('timestamp', '2026-02-03 04:05:06.7'), ('timestamptz', '2026-02-03 04:05:06.7+05:30'), ('time', '04:05'), ('timetz', '04:05+02'), ('interval', '1 day -02:03:04'), ('int[]', '{1,NULL,3}'), ('timestamptz[]', '{2026-02-03}'),
	('jsonb', '{"b": 1.0, "a": [true]}'), ('json', '{"b": 1.0,  "a": 1}'), ('inet', '10.0.0.1/24'), ('macaddr', '08:00:2b:01:02:03'), ('bit(3)', '101'), ('point', '(1.1,2)'), ('int4range', '[1,5)'), ('oid', '42'),
	('regclass', 'pg_class'), ('pg_lsn', '16/B374D848'), ('tsvector', 'a b'), ('shop.colour', 'dark "red"'), ('shop.money2', '3'), ('shop.codes', '{a,"b c"}'), ('shop.span', '[a,b)');
DO $$
DECLARE
	t record;
	n integer;
BEGIN
	FOR t IN SELECT type, value, row_number() OVER () AS n FROM types LOOP
		EXECUTE format('CREATE TABLE typed_%1$s (k1 %2$s, k2 int, folio %2$s, sku %2$s)', t.n, t.type);
		PERFORM softmobile.attach(format('typed_%s', t.n)::regclass, 'single_' || t.n, key => '{k1}', folio_column => 'folio', sku_column => 'sku');
		EXECUTE format('CREATE TABLE double_%1$s (LIKE typed_%1$s)', t.n);
		PERFORM softmobile.attach(format('double_%s', t.n)::regclass, 'double_' || t.n, key => '{k1,k2}', folio_column => 'folio', sku_column => 'sku');
		EXECUTE format('INSERT INTO typed_%1$s VALUES (%2$L, 1, %2$L, %2$L)', t.n, t.value);
		EXECUTE format('INSERT INTO double_%1$s VALUES (%2$L, 1, %2$L, %2$L), (NULL, 2, NULL, NULL)', t.n, t.value);
	END LOOP;
END
$$;
SELECT arrive();
SET DateStyle = 'German';
SET TimeZone = 'Asia/Kolkata';
SET IntervalStyle = 'iso_8601';
SET bytea_output = 'escape';
SET extra_float_digits = -10;
SELECT * FROM differences();
RESET DateStyle;
RESET TimeZone;
RESET IntervalStyle;
RESET bytea_output;
RESET extra_float_digits;
SELECT count(DISTINCT question ->> 'entity_type') AS compared, sum((answer ->> 'rows')::int) AS rows FROM asked WHERE question ->> 'entity_type' ~ '^(single|double)_';
CREATE CAST (colour AS json) WITH FUNCTION secret(colour);
SELECT count(*) FROM differences();

CREATE TABLE odd (id pair PRIMARY KEY, folio colour[]);
SELECT softmobile.attach('odd', 'odd', folio_column => 'folio');
SELECT * FROM failure($$SELECT softmobile.reconcile('S1', '2026-01-01', '2026-12-31')$$) \gx
DROP TABLE odd;

-- roles
CREATE ROLE regress_softmobile_app;
SELECT softmobile.grant_role('regress_softmobile_app', 'app');
GRANT USAGE ON SCHEMA shop TO regress_softmobile_app;
SELECT secretly('UPDATE typed_1 SET sku = 99');
SET ROLE regress_softmobile_app;
SELECT softmobile.set_reason('recounted by the app') FROM softmobile.reconcile(branch => 'S1', "from" => '2026-01-01', "to" => '2026-01-31') AS d, softmobile.resolve_discrepancy(id => d.id, reason => 'recounted by the app');
SELECT kind, detail, status, resolved_by, reason FROM softmobile.sync_discrepancy WHERE resolved_by = current_user;
SELECT state, message FROM failure('SELECT * FROM softmobile.discrepancy');
RESET ROLE;
SELECT triggered_by FROM softmobile.sync_history ORDER BY id DESC LIMIT 1;
SELECT current_user_name FROM softmobile.sync_audit WHERE action = 'resolve_discrepancy' ORDER BY id DESC LIMIT 1;
DROP OWNED BY regress_softmobile_app;
DROP ROLE regress_softmobile_app;

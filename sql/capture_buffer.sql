-- A transaction's events are gathered and written together: nobody may notice, whatever happens between.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE sale (id integer PRIMARY KEY, note text, n integer NOT NULL DEFAULT 0);
CREATE TABLE log (id serial PRIMARY KEY, note text);
SELECT softmobile.attach('sale', 'sale'), softmobile.attach('log', 'log', priority => 'HIGH');
-- The lane of both: how many events, and whether numbers are in one piece and follow the changes.
CREATE VIEW lane AS
SELECT count(*) AS events, max(seq) - min(seq) + 1 = count(*) AS in_one_piece, bool_and(created_at >= earlier) AS in_order
FROM (SELECT e.seq, e.created_at, lag(e.created_at, 1, '-infinity') OVER (ORDER BY e.seq) AS earlier
	FROM softmobile.outbox_event e JOIN softmobile.outbox_lane l USING (lane_id) WHERE l.branch_id = 'S1' AND l.priority = 'HIGH') AS s;

-- more than the buffer holds, by each kind of statement; each sees its own events as soon as it is over
BEGIN;
INSERT INTO sale SELECT i, 'x' FROM generate_series(1, 1000) AS i;
SELECT * FROM lane;
UPDATE sale SET n = 1 WHERE id % 2 = 0;
SELECT * FROM lane;
INSERT INTO sale SELECT i FROM generate_series(901, 1100) AS i ON CONFLICT (id) DO UPDATE SET note = 'again';
SELECT * FROM lane;
COPY sale (id) FROM PROGRAM 'seq 2001 2300';
SELECT * FROM lane;
DELETE FROM sale WHERE id > 2000;
MERGE INTO sale USING generate_series(1001, 1200) AS i ON id = i WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (i);
SELECT * FROM lane;
COMMIT;
-- each row's events one after the other, each telling the old values that the one before told as new
SELECT count(*) AS events, count(DISTINCT id) AS rows, bool_and((payload -> 'old') IS NULL OR before @> (payload -> 'old')) AS chained
FROM (SELECT op, id, payload::jsonb, lag(payload::jsonb -> 'new') OVER (PARTITION BY id ORDER BY place) AS before FROM fresh()) AS s;

-- a statement that fails after many rows leaves nothing behind, also within a block that catches it
INSERT INTO sale SELECT i FROM generate_series(-300, 1) AS i;
DO $$
BEGIN
	INSERT INTO sale VALUES (3000);
	BEGIN
		INSERT INTO sale SELECT i FROM generate_series(-300, 1) AS i;
	EXCEPTION WHEN unique_violation THEN
		INSERT INTO sale VALUES (3001);
	END;
	INSERT INTO sale VALUES (3002);
END
$$;
BEGIN;
INSERT INTO sale SELECT i FROM generate_series(4000, 4099) AS i;
SAVEPOINT a;
INSERT INTO sale SELECT i FROM generate_series(4100, 4199) AS i;
ROLLBACK TO a;
SAVEPOINT b;
UPDATE sale SET note = 'b' WHERE id BETWEEN 4000 AND 4009;
RELEASE b;
COMMIT;
SELECT op, id FROM fresh() WHERE id::integer < 4000;
SELECT op, count(*), min(id), max(id) FROM fresh() GROUP BY op;
SELECT count(*) FROM events WHERE id::integer BETWEEN 4000 AND 4199;

-- Triggers that begin subtransactions while the statement's own events are in the buffer: what they roll back vanishes, the rest stays,
-- and all stands in the order of the changes.  Ours is fired first for its row, theirs after it.
CREATE FUNCTION try_things() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	FOR i IN 1..3 LOOP
		BEGIN
			INSERT INTO log (note) VALUES (new.id || '.' || i);
			BEGIN
				INSERT INTO log (note) VALUES (new.id || '.' || i || ' inner');
				IF i = 2 THEN
					RAISE 'inner';
				END IF;
			EXCEPTION WHEN raise_exception THEN
				INSERT INTO log (note) VALUES (new.id || '.' || i || ' caught');
			END;
			IF i = 3 THEN
				RAISE 'outer';
			END IF;
		EXCEPTION WHEN raise_exception THEN
		END;
	END LOOP;
	RETURN NULL;
END
$$;
CREATE TRIGGER try_things AFTER INSERT ON sale FOR EACH ROW EXECUTE FUNCTION try_things();
INSERT INTO sale VALUES (5001), (5002);
SELECT op, entity, coalesce(payload -> 'new' ->> 'note', id) AS what FROM fresh();
-- many of them
INSERT INTO sale SELECT i FROM generate_series(5100, 5299) AS i;
SELECT entity, count(*) FROM fresh() GROUP BY entity ORDER BY entity;
-- one that rolls back everything that it did after it has filled the buffer
CREATE OR REPLACE FUNCTION try_things() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	BEGIN
		INSERT INTO log (note) SELECT new.id || '.' || i FROM generate_series(1, 200) AS i;
		RAISE 'no';
	EXCEPTION WHEN raise_exception THEN
	END;
	INSERT INTO log (note) VALUES (new.id || ' kept');
	RETURN NULL;
END
$$;
INSERT INTO sale VALUES (5301), (5302), (5303);
SELECT op, entity, coalesce(payload -> 'new' ->> 'note', id) AS what FROM fresh();
DROP TRIGGER try_things ON sale;

-- What a trigger reads of the log: all that was captured before it.  In a subtransaction of its own it does not see what its statement
-- has gathered and not written yet; afterwards it does.
CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	outside bigint;
	inside bigint;
BEGIN
	BEGIN
		SELECT count(*) INTO inside FROM events e WHERE e.id::integer BETWEEN 5900 AND 5999;
	EXCEPTION WHEN division_by_zero THEN
	END;
	SELECT count(*) INTO outside FROM events e WHERE e.id::integer BETWEEN 5900 AND 5999;
	RAISE NOTICE 'row %: % inside, % outside', new.id, inside, outside;
	RETURN NULL;
END
$$;
CREATE TRIGGER look AFTER INSERT ON sale FOR EACH ROW EXECUTE FUNCTION look();
INSERT INTO sale VALUES (5901), (5902);
DROP TRIGGER look ON sale;
CREATE FUNCTION count_events() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	before bigint := (SELECT count(*) FROM events e WHERE e.id::integer BETWEEN 6000 AND 6999 AND e.entity = 'sale');
BEGIN
	UPDATE sale SET n = before WHERE id = new.id;
	RETURN NULL;
END
$$;
CREATE TRIGGER count_events AFTER INSERT ON sale FOR EACH ROW EXECUTE FUNCTION count_events();
INSERT INTO sale VALUES (6001), (6002), (6003) RETURNING id, n;
SELECT id, n FROM sale WHERE id > 6000 ORDER BY id;
SELECT op, id, payload FROM fresh() WHERE id::integer > 6000;
DROP TRIGGER count_events ON sale;
-- a statement does not read its own; a function that it calls reads what was captured before
CREATE FUNCTION sold(id integer) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO sale VALUES (id);
	RETURN (SELECT count(*) FROM events e WHERE e.id::integer BETWEEN 7000 AND 7999);
END
$$;
SELECT sold(7000 + i) FROM generate_series(1, 3) AS i;
WITH s AS (INSERT INTO sale VALUES (7004) RETURNING id) SELECT s.id, (SELECT count(*) FROM events e WHERE e.id::integer BETWEEN 7000 AND 7999) FROM s;
-- a cursor shows what was there when it was opened
BEGIN;
DECLARE c CURSOR FOR SELECT id FROM events e WHERE e.id::integer BETWEEN 7000 AND 7999;
INSERT INTO sale VALUES (7005);
FETCH ALL FROM c;
DECLARE d CURSOR FOR SELECT sold(7010 + i) FROM generate_series(1, 3) AS i;
FETCH 2 FROM d;
SELECT count(*) FROM events e WHERE e.id::integer BETWEEN 7000 AND 7999;
COMMIT;
SELECT op, id FROM fresh();

-- cascades of foreign keys
CREATE TABLE head (id integer PRIMARY KEY);
CREATE TABLE tail (id integer PRIMARY KEY, head integer REFERENCES head ON DELETE CASCADE ON UPDATE CASCADE);
SELECT softmobile.attach('head', 'purchase'), softmobile.attach('tail', 'purchase_line');
INSERT INTO head VALUES (1), (2), (3);
INSERT INTO tail SELECT i, i % 3 + 1 FROM generate_series(1, 300) AS i;
UPDATE head SET id = 10 WHERE id = 1;
DELETE FROM head;
SELECT op, entity, count(*) FROM fresh() GROUP BY op, entity ORDER BY entity, op;

-- deferred triggers that sell at the end of the transaction, of both kinds
CREATE FUNCTION sell_late() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO log (note) SELECT new.id || '.' || i FROM generate_series(1, 100) AS i;
	INSERT INTO log (note) VALUES (new.id || ' saw ' || (SELECT count(*) FROM events e WHERE e.entity = 'log' AND e.payload -> 'new' ->> 'note' LIKE new.id || '.%'));
	RETURN NULL;
END
$$;
CREATE CONSTRAINT TRIGGER sell_late AFTER INSERT ON sale DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION sell_late();
INSERT INTO sale VALUES (8001);
BEGIN;
INSERT INTO sale VALUES (8002);
PREPARE TRANSACTION 'regress_late';
BEGIN;
INSERT INTO sale VALUES (8003);
PREPARE TRANSACTION 'regress_never';
ROLLBACK PREPARED 'regress_never';
COMMIT PREPARED 'regress_late';
SELECT split_part(payload -> 'new' ->> 'note', '.', 1) AS note, count(*) FROM fresh() WHERE entity = 'log' GROUP BY 1 ORDER BY 1;
DROP TRIGGER sell_late ON sale;

-- an error while the events are written is an error of the statement that fills the buffer, or else of the commit: a number that is taken,
-- because somebody set the sequence back
CREATE FUNCTION set_numbers(what text) RETURNS boolean LANGUAGE sql AS $$
	SELECT setval(format('softmobile.lane_%s_seq', e.lane_id)::regclass, CASE what WHEN 'back' THEN min(e.seq) ELSE max(e.seq) + 1000 END) IS NOT NULL
	FROM softmobile.outbox_event e JOIN softmobile.outbox_lane l USING (lane_id) WHERE l.priority = 'HIGH' AND l.branch_id = 'S1' GROUP BY e.lane_id
$$;
SELECT set_numbers('back');
BEGIN;
INSERT INTO head VALUES (9000);
SELECT state, message FROM failure('INSERT INTO shop.sale SELECT i FROM generate_series(9001, 9199) AS i');
COMMIT;
BEGIN;
INSERT INTO sale VALUES (9200);
\set VERBOSITY terse
COMMIT;
\set VERBOSITY default
SELECT count(*) FROM sale WHERE id BETWEEN 9001 AND 9200;
SELECT set_numbers('on');
INSERT INTO sale VALUES (9300);
SELECT op, entity, id FROM fresh();
-- or an index that an event cannot be put into
CREATE INDEX odd ON softmobile.outbox_event_1 (lower(entity_id));
INSERT INTO sale VALUES (9301);
DROP INDEX softmobile.odd;
-- while any other may be there
CREATE INDEX even ON softmobile.outbox_event_1 (folio, entity_id);
CREATE INDEX ON softmobile.outbox_event_1 USING brin (created_at);
INSERT INTO sale SELECT i FROM generate_series(9400, 9499) AS i;
DROP INDEX softmobile.even;
SELECT min(id), max(id), count(*) FROM fresh();
-- the one on id leads to each
SET enable_seqscan = off;
SELECT brin_summarize_new_values('softmobile.outbox_event_1_id') > 0 AS summarized;
INSERT INTO sale SELECT i FROM generate_series(9500, 9999) AS i;
SELECT count(*) FROM seen s WHERE NOT EXISTS (SELECT FROM softmobile.outbox_event_1 e WHERE e.id = s.event OFFSET 0);
SELECT count(*) FROM fresh() f WHERE EXISTS (SELECT FROM softmobile.outbox_event_1 e WHERE e.id = f.event OFFSET 0);
RESET enable_seqscan;

-- the branch is registered, and an epoch opened, while events are in the buffer: they go where later ones go
-- (each of the three statements is a transaction)
SET softmobile.branch_id = 'S2';
CREATE FUNCTION reorganize() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF new.id = 10001 THEN
		PERFORM softmobile.register_branch('S2', 'Norte');
	ELSIF new.id = 10011 THEN
		PERFORM softmobile.open_epoch('a test');
	END IF;
	RETURN NULL;
END
$$;
CREATE TRIGGER reorganize AFTER INSERT ON sale FOR EACH ROW EXECUTE FUNCTION reorganize();
INSERT INTO sale VALUES (10000), (10001), (10002);
INSERT INTO sale VALUES (10010), (10011), (10012);
INSERT INTO sale VALUES (10020);
SELECT e.entity_id, l.branch_id, e.branch_id AS in_row, dense_rank() OVER (ORDER BY l.epoch_no) AS epoch, dense_rank() OVER (ORDER BY l.epoch_no, e.seq) AS place
FROM softmobile.outbox_event e JOIN softmobile.outbox_lane l USING (lane_id) WHERE length(e.entity_id) = 5 ORDER BY 1;
DROP TRIGGER reorganize ON sale;
SET softmobile.branch_id = 'S1';

-- long texts: out of line, and more than the buffer holds in one
SELECT count(*) FROM fresh();
INSERT INTO sale SELECT 11000 + i, repeat(chr(65 + i) || '-', 100000 * (i % 2)) FROM generate_series(1, 4) AS i;
INSERT INTO sale SELECT 11010 + i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 10000) AS j) FROM generate_series(1, 3) AS i;
SELECT e.id, length(e.payload::text), e.payload -> 'new' ->> 'note' = coalesce(s.note, '') AS same FROM fresh() e JOIN sale s ON s.id = e.id::integer ORDER BY 1;

-- memory: bounded, whatever the statement's size
CREATE TABLE memory (bytes bigint);
CREATE FUNCTION note_memory() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO memory SELECT sum(total_bytes) FROM pg_backend_memory_contexts WHERE name LIKE 'softmobile%' OR parent LIKE 'softmobile%';
	RETURN NULL;
END
$$;
CREATE TRIGGER note_memory AFTER INSERT ON sale FOR EACH STATEMENT EXECUTE FUNCTION note_memory();
INSERT INTO sale SELECT i, repeat('x', 500) FROM generate_series(20001, 20100) AS i;
INSERT INTO sale SELECT i, repeat('x', 500) FROM generate_series(30001, 50000) AS i;
SELECT count(*), max(bytes) < 1024 * 1024 AS bounded FROM memory;
SELECT count(*) FROM fresh();
-- TRUNCATE is refused in the midst of it all
BEGIN;
INSERT INTO sale VALUES (60000);
TRUNCATE sale;
ROLLBACK;
SELECT count(*) FROM fresh();

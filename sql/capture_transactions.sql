-- Invariant 1: committed means captured; rolled back, in whole or in part, means not.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
CREATE TABLE sale (id integer PRIMARY KEY, note text);
SELECT softmobile.attach('sale', 'sale');

BEGIN;
INSERT INTO sale VALUES (1);
ROLLBACK;
SELECT count(*) FROM fresh();

-- savepoints, nested
BEGIN;
INSERT INTO sale VALUES (1);
SAVEPOINT a;
INSERT INTO sale VALUES (2);
SAVEPOINT b;
INSERT INTO sale VALUES (3);
ROLLBACK TO a;
INSERT INTO sale VALUES (4);
SAVEPOINT c;
INSERT INTO sale VALUES (5);
RELEASE c;
SAVEPOINT d;
UPDATE sale SET note = 'lost';
ROLLBACK TO d;
DELETE FROM sale WHERE id = 1;
COMMIT;
SELECT op, id FROM fresh();

-- PL/pgSQL's exception blocks, and commits within a procedure
DO $$
BEGIN
	INSERT INTO sale VALUES (10);
	BEGIN
		INSERT INTO sale VALUES (11);
		BEGIN
			INSERT INTO sale VALUES (12);
			PERFORM 1 / 0;
		EXCEPTION WHEN division_by_zero THEN
			INSERT INTO sale VALUES (13);
		END;
		INSERT INTO sale VALUES (10);
	EXCEPTION WHEN unique_violation THEN
		INSERT INTO sale VALUES (14);
	END;
	FOR i IN 20..25 LOOP
		BEGIN
			INSERT INTO sale VALUES (i);
			IF i % 2 = 0 THEN
				RAISE 'even';
			END IF;
		EXCEPTION WHEN raise_exception THEN
		END;
	END LOOP;
END
$$;
CREATE PROCEDURE several() LANGUAGE plpgsql AS $$
BEGIN
	INSERT INTO sale VALUES (30);
	COMMIT;
	INSERT INTO sale VALUES (31);
	ROLLBACK;
	INSERT INTO sale VALUES (32);
END
$$;
CALL several();
SELECT op, id FROM fresh();

-- a statement that fails half way
INSERT INTO sale VALUES (40), (41), (30);
UPDATE sale SET id = id / 0 WHERE id > 30;
COPY sale FROM stdin;
42	ok
x	not ok
\.
SELECT count(*) FROM fresh();

-- two phases
BEGIN;
INSERT INTO sale VALUES (50);
PREPARE TRANSACTION 'regress_kept';
BEGIN;
INSERT INTO sale VALUES (51);
PREPARE TRANSACTION 'regress_dropped';
SELECT count(*) FROM fresh();
INSERT INTO sale VALUES (52);
COMMIT PREPARED 'regress_kept';
ROLLBACK PREPARED 'regress_dropped';
-- the earlier number, committed later
SELECT op, id FROM fresh();

-- READ ONLY
BEGIN READ ONLY;
INSERT INTO sale VALUES (60);
ROLLBACK;
BEGIN READ ONLY;
SELECT count(*) FROM sale;
COMMIT;
-- every isolation level; the transaction sees its own events
BEGIN ISOLATION LEVEL REPEATABLE READ;
INSERT INTO sale VALUES (61);
SELECT op, id FROM events WHERE id = '61';
COMMIT;
BEGIN ISOLATION LEVEL SERIALIZABLE;
INSERT INTO sale VALUES (62);
UPDATE sale SET note = 'serializable' WHERE id = 62;
COMMIT;
SELECT op, id FROM fresh();

-- replica mode: what arrives by replication was captured where it was born
SET session_replication_role = replica;
INSERT INTO sale VALUES (70);
RESET session_replication_role;
SET session_replication_role = local;
INSERT INTO sale VALUES (71);
RESET session_replication_role;
SELECT op, id FROM fresh();

-- cursors, prepared statements, an unlogged or temporary copy
PREPARE sell AS INSERT INTO sale VALUES ($1, $2);
EXECUTE sell(80, 'a');
EXECUTE sell(81, 'b');
BEGIN;
DECLARE c CURSOR FOR SELECT * FROM sale WHERE id IN (80, 81) ORDER BY id FOR UPDATE;
FETCH c;
UPDATE sale SET note = 'by cursor' WHERE CURRENT OF c;
FETCH c;
DELETE FROM sale WHERE CURRENT OF c;
COMMIT;
CREATE TEMP TABLE sale_copy (LIKE sale INCLUDING ALL);
INSERT INTO sale_copy VALUES (1);
CREATE TABLE sale_as AS SELECT * FROM sale;
SELECT op, id, payload FROM fresh();

-- settings of the session survive capture, also when it fails
SET datestyle = 'German, DMY';
SET timezone = 'Asia/Kathmandu';
CREATE TABLE timed (id integer PRIMARY KEY, at timestamptz[], d daterange);
SELECT softmobile.attach('timed', 'return');
INSERT INTO timed VALUES (1, '{"01.02.2026 00:00 UTC"}', '[01.02.2026,02.03.2026)');
BEGIN;
SAVEPOINT s;
SET LOCAL softmobile.reason = 'no';
INSERT INTO timed VALUES (2, NULL, NULL);
ROLLBACK TO s;
SELECT current_setting('datestyle'), current_setting('timezone');
COMMIT;
SELECT at, d, current_setting('datestyle') FROM timed;
SELECT op, id, payload FROM fresh();

-- Invariant 1: partitions and inheritance children follow the attached table.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';

-- partitions that are there, sub-partitions, partitions whose columns lie otherwise
CREATE TABLE move (id integer, day integer, kind text, note text, PRIMARY KEY (id, day, kind)) PARTITION BY RANGE (day);
CREATE TABLE move_1 PARTITION OF move FOR VALUES FROM (0) TO (10);
CREATE TABLE move_2 PARTITION OF move FOR VALUES FROM (10) TO (20) PARTITION BY LIST (kind);
CREATE TABLE move_2a PARTITION OF move_2 FOR VALUES IN ('a');
SELECT softmobile.attach('move', 'inventory_movement', key => '{id}');
CREATE TABLE move_2b (gone integer, note text, kind text NOT NULL, day integer NOT NULL, id integer NOT NULL);
ALTER TABLE move_2b DROP COLUMN gone;
ALTER TABLE move_2 ATTACH PARTITION move_2b FOR VALUES IN ('b');
CREATE TABLE move_3 PARTITION OF move FOR VALUES FROM (20) TO (30);
CREATE TABLE move_rest PARTITION OF move DEFAULT PARTITION BY LIST (kind);
CREATE TABLE move_rest_a PARTITION OF move_rest DEFAULT;
INSERT INTO move VALUES (1, 1, 'a', NULL), (2, 11, 'a', NULL), (3, 12, 'b', 'x'), (4, 21, 'a', NULL), (5, 99, 'z', NULL);
-- directly
INSERT INTO move_2b (id, day, kind) VALUES (6, 13, 'b');
UPDATE move_2 SET note = 'sub' WHERE day = 12;
DELETE FROM move_rest_a;
SELECT op, id, payload FROM fresh();
-- a row that moves to another partition stays the same entity
UPDATE move SET day = 21 WHERE id = 1;
UPDATE move SET kind = 'b' WHERE id = 2;
SELECT op, id, payload FROM fresh();
COPY move FROM stdin;
20	5	a	copied
21	15	a	copied
\.
MERGE INTO move m USING (VALUES (20), (22)) AS v (id) ON m.id = v.id
WHEN MATCHED THEN UPDATE SET day = 25 WHEN NOT MATCHED THEN INSERT (id, day, kind) VALUES (v.id, 2, 'a');
INSERT INTO move VALUES (22, 2, 'a') ON CONFLICT (id, day, kind) DO UPDATE SET note = 'conflict';
SELECT op, id, payload FROM fresh();
-- TRUNCATE is refused on every level
SELECT * FROM failure('TRUNCATE move') \gx
SELECT message FROM failure('TRUNCATE move_1');
SELECT message FROM failure('TRUNCATE ONLY move_2b');
SELECT message FROM failure('TRUNCATE move_3');
-- what is detached is captured no longer, and can be truncated
ALTER TABLE move DETACH PARTITION move_3;
INSERT INTO move_3 VALUES (30, 22, 'a');
TRUNCATE move_3;
DROP TABLE move_rest;
ALTER TABLE move DETACH PARTITION move_2 CONCURRENTLY;
INSERT INTO move_2 VALUES (31, 11, 'a');
TRUNCATE move_2;
SELECT count(*) FROM fresh();
ALTER TABLE move ATTACH PARTITION move_3 FOR VALUES FROM (20) TO (30);
INSERT INTO move VALUES (32, 22, 'a');
SELECT op, id FROM fresh();
SELECT message FROM failure('TRUNCATE move_3');
-- an attached table can become a partition only after it is detached
CREATE TABLE move_4 (LIKE move INCLUDING ALL);
SELECT softmobile.attach('move_4', 'inventory_movement');
SELECT * FROM failure('ALTER TABLE move ATTACH PARTITION move_4 FOR VALUES FROM (40) TO (50)') \gx
SELECT softmobile.detach('move_4');
ALTER TABLE move ATTACH PARTITION move_4 FOR VALUES FROM (40) TO (50);
INSERT INTO move VALUES (33, 41, 'a');
SELECT op, id FROM fresh();
-- no partition by itself
SELECT * FROM failure($$SELECT softmobile.attach('move_4', 'x')$$) \gx
CREATE TABLE loose (id integer PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE loose_1 PARTITION OF loose FOR VALUES FROM (0) TO (10);
SELECT * FROM failure($$SELECT softmobile.attach('loose_1', 'x')$$) \gx
-- detach() leaves nothing
SELECT softmobile.detach('move');
INSERT INTO move VALUES (40, 1, 'a');
TRUNCATE move;
SELECT count(*) FROM fresh();
SELECT count(*) FROM pg_trigger WHERE tgname LIKE '%softmobile%' AND tgrelid::regclass::text LIKE 'move%';
-- a partitioned table can be attached with existing partitions, and again
SELECT softmobile.attach('move', 'inventory_movement', key => '{id}');
INSERT INTO move VALUES (41, 1, 'a');
SELECT op, id FROM fresh();
DROP TABLE move;
SELECT count(*) FROM softmobile.captured_table;

-- inheritance: children that are there and children that come
CREATE TABLE party (id integer PRIMARY KEY, name text);
CREATE TABLE person (born date) INHERITS (party);
SELECT softmobile.attach('party', 'party');
CREATE TABLE firm (vat text) INHERITS (party);
CREATE TABLE bank (swift text) INHERITS (firm);
CREATE TABLE shop_of (name text, id integer NOT NULL, extra text);
ALTER TABLE shop_of INHERIT party;
INSERT INTO party VALUES (1, 'a');
INSERT INTO person VALUES (2, 'b', '2000-01-01');
INSERT INTO firm VALUES (3, 'c', 'MX');
INSERT INTO bank VALUES (4, 'd', 'MX', 'BMX');
INSERT INTO shop_of VALUES ('e', 5);
UPDATE party SET name = upper(name) WHERE id > 3;
SELECT op, entity, id, payload FROM fresh();
SELECT message FROM failure('TRUNCATE party');
SELECT message FROM failure('TRUNCATE bank');
-- a child that leaves sells on, uncaptured, and its children with it
ALTER TABLE firm NO INHERIT party;
INSERT INTO firm VALUES (6, 'f', 'MX');
INSERT INTO bank VALUES (7, 'g', 'MX', 'BMX');
TRUNCATE bank;
SELECT count(*) FROM fresh();
ALTER TABLE firm INHERIT party;
INSERT INTO bank VALUES (8, 'h', 'MX', 'BMX');
SELECT op, entity, id FROM fresh();
-- of two attached parents
CREATE TABLE taxed (id integer PRIMARY KEY, rate numeric);
SELECT softmobile.attach('taxed', 'taxed');
ALTER TABLE bank ADD COLUMN rate numeric;
ALTER TABLE bank INHERIT taxed;
SELECT softmobile.detach('party');
INSERT INTO bank VALUES (9, 'i', 'MX', 'BMX', 1.6);
INSERT INTO person VALUES (10, 'j');
SELECT op, entity, id FROM fresh();
-- a child that is attached by itself stays so, whatever becomes of its parent
SELECT softmobile.attach('person', 'person', key => '{id}'), softmobile.attach('party', 'party');
INSERT INTO person VALUES (11, 'k');
INSERT INTO party VALUES (12, 'l');
SELECT softmobile.detach('party');
INSERT INTO person VALUES (13, 'm');
INSERT INTO party VALUES (14, 'n');
SELECT op, entity, id FROM fresh();
SELECT softmobile.attach('party', 'party');
SELECT softmobile.detach('person');
INSERT INTO person VALUES (15, 'o');
SELECT op, entity, id FROM fresh();

-- the owner of an attached table, who is no superuser, goes on making partitions and altering it
CREATE ROLE regress_owner;
CREATE ROLE regress_heir;
GRANT ALL ON SCHEMA shop TO regress_owner, regress_heir;
CREATE FUNCTION may_execute() RETURNS text LANGUAGE sql AS $$
	SELECT string_agg(a.grantee::regrole || ' ' || p.proname, ', ' ORDER BY a.grantee::regrole::text, p.proname) FROM pg_proc p CROSS JOIN LATERAL aclexplode(p.proacl) AS a
	WHERE p.oid IN ('softmobile.capture()'::regprocedure, 'softmobile.refuse_truncate()'::regprocedure) AND a.grantee <> p.proowner
$$;
SET ROLE regress_owner;
CREATE TABLE owned (id integer PRIMARY KEY) PARTITION BY RANGE (id);
RESET ROLE;
SELECT softmobile.attach('owned', 'owned');
SET ROLE regress_owner;
CREATE TABLE owned_1 PARTITION OF owned FOR VALUES FROM (0) TO (10);
CREATE TABLE owned_2 (LIKE owned INCLUDING ALL);
ALTER TABLE owned ATTACH PARTITION owned_2 FOR VALUES FROM (10) TO (20);
ALTER TABLE owned RENAME id TO number;
INSERT INTO owned VALUES (1), (11);
SELECT state, message FROM failure('TRUNCATE owned_2');
RESET ROLE;
SELECT op, id FROM fresh();
SELECT may_execute();
-- the right follows the owner, and ends with the last of his attached tables
ALTER TABLE owned OWNER TO regress_heir;
SELECT may_execute();
ALTER TABLE owned_1 OWNER TO regress_heir;
ALTER TABLE owned_2 OWNER TO regress_heir;
SELECT may_execute();
SET ROLE regress_heir;
CREATE TABLE owned_3 PARTITION OF owned FOR VALUES FROM (20) TO (30);
DROP TABLE owned;
RESET ROLE;
SELECT may_execute();
REVOKE ALL ON SCHEMA shop FROM regress_owner, regress_heir;
DROP ROLE regress_owner, regress_heir;

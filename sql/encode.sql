-- What is captured is what row_to_json() says, byte for byte, for every type, whatever the session's settings are.
\getenv srcdir PG_ABS_SRCDIR
\set ECHO none
\i :srcdir/test/regress/prelude.sql
\set ECHO all
SET softmobile.reason = 'regression test';
SET client_min_messages = warning;

-- The oracle: the row as it stands, under the settings that capture promises.
CREATE FUNCTION oracle(relation regclass, which text) RETURNS text LANGUAGE plpgsql
SET datestyle = 'ISO' SET intervalstyle = 'postgres' SET timezone = 'UTC' SET bytea_output = 'hex' SET extra_float_digits = 1
SET quote_all_identifiers = off SET search_path = pg_catalog, pg_temp AS $$
DECLARE
	text text;
BEGIN
	EXECUTE format('SELECT row_to_json(whole)::text FROM %s whole WHERE %s', relation, which) INTO text;
	RETURN text;
END
$$;
-- Settings as far from these as can be.
CREATE PROCEDURE hostile() LANGUAGE plpgsql AS $$
BEGIN
	SET datestyle = 'SQL, DMY';
	SET intervalstyle = 'iso_8601';
	SET timezone = 'Asia/Kathmandu';
	SET bytea_output = 'escape';
	SET extra_float_digits = -10;
	SET quote_all_identifiers = on;
END
$$;

-- Every built-in type that a column can have: of each, every literal below that it accepts.
CREATE TABLE literal (l text);
INSERT INTO literal VALUES ('0'), ('1'), ('-1'), ('t'), ('12345.678'), ('1e30'), ('-0'), ('NaN'), ('Infinity'), ('-Infinity'), ('1.10'),
	('2026-01-31'), ('2026-07-31 12:34:56.789'), ('2026-07-31 12:34:56.000001+05:45'), ('infinity'), ('-infinity'), ('0044-03-15 BC'), ('4713-01-01 BC'), ('5874897-12-31'),
	('24:00:00'), ('23:59:60'), ('12:34:56.5'), ('12:34:56-08'), ('1 year -2 months 3 days 04:05:06.7'), ('-1 day'),
	(''), (' '), ('a'), ('x "quoted" \back'), (E'line\nfeed\ttab\rreturn\b\f'), (E'\x01\x1f\x7f'), ('ñ é 日本 😀 </script>'), (repeat('long ', 500)),
	('\x00ff41'), ('a\\b\000c'), ('101'), ('B101'), ('192.168.0.1/24'), ('::1'), ('10.0.0.0/8'), ('08:00:2b:01:02:03'), ('08:00:2b:01:02:03:04:05'),
	('{"b": 1, "a":  [1.0, null, "x"] , "a":2}'), ('[]'), ('null'), ('"s"'), ('<a>1</a>'), ('<?xml version="1.0"?><b/>'),
	('(1,2)'), ('{1,2,3}'), ('[(0,0),(1,1)]'), ('((0,0),(1,1),(2,0))'), ('<(0,0),1>'), ('(1,1),(0,0)'),
	('''a'':1 ''b'':2,3B'), ('a & !b | c:*'), ('16/B374D848'), ('pg_class'), ('pg_catalog'), ('integer'), ('now'), ('+'), ('sum(integer)'), ('-(integer,integer)'), ('english'), ('simple'),
	('C'), ('(0,1)'), ('10:20:10,14,15'), ('123e4567-e89b-12d3-a456-426614174000'), ('$1,234.50'), ('1 2 3'),
	('empty'), ('[1,10)'), ('(,)'), ('[2026-01-01,2026-02-01)'), ('["2026-01-01 00:00","2026-01-02 00:00+05:45"]'), ('(,infinity]'), ('{[1,2),[5,9)}'), ('{}'), ('{[2026-01-01,2026-02-01)}');
CREATE FUNCTION try_type(type text, OUT accepted bigint, OUT different text) LANGUAGE plpgsql AS $$
DECLARE
	lit text;
BEGIN
	EXECUTE format('CREATE TABLE shop.one_type (id serial PRIMARY KEY, v %s)', type);
	PERFORM softmobile.attach('shop.one_type', 'one_type');
	FOR lit IN SELECT l FROM shop.literal LOOP
		BEGIN
			EXECUTE format('INSERT INTO shop.one_type (v) VALUES (%L)', lit);
		EXCEPTION WHEN OTHERS THEN
			IF SQLSTATE LIKE 'XX%' THEN
				RAISE;
			END IF;
		END;
	END LOOP;
	EXECUTE 'SELECT count(*), string_agg(e.payload::text || '' but '' || o.json, E''\n'') FILTER (WHERE e.payload::text <> ''{"new":'' || o.json || ''}'')'
		' FROM shop.one_type t CROSS JOIN LATERAL (SELECT shop.oracle(''shop.one_type'', ''id = '' || t.id) AS json) AS o'
		' FULL JOIN shop.events e ON e.entity = ''one_type'' AND e.id = t.id::text AND e.event NOT IN (SELECT event FROM shop.seen)' INTO accepted, different;
	INSERT INTO shop.seen SELECT event FROM shop.events EXCEPT SELECT event FROM shop.seen;
	DROP TABLE shop.one_type;
END
$$;
CALL hostile();
CREATE TABLE tried AS
SELECT format_type(t.oid, NULL) AS type, t.typcategory AS category, r.*
FROM pg_type t CROSS JOIN LATERAL try_type(format_type(t.oid, NULL)) AS r
WHERE t.typnamespace = 'pg_catalog'::regnamespace AND t.typtype IN ('b', 'r', 'm') AND t.typisdefined AND t.typrelid = 0
	AND (t.typelem = 0 OR t.typsubscript <> 'array_subscript_handler'::regproc OR t.typname IN ('_int4', '_text', '_timestamptz', '_numeric', '_money', '_interval', '_bytea', '_float8', '_jsonb', '_date', '_regclass'))
	AND t.typname !~ '^(pg_node_tree|pg_ndistinct|pg_dependencies|pg_mcv_list|pg_brin.*|gtsvector|pg_snapshot|txid_snapshot|aclitem)$'
ORDER BY t.typname;
SELECT * FROM tried WHERE accepted = 0 OR different IS NOT NULL;
SELECT count(*) > 60 AS many_types, sum(accepted) > 400 AS many_values FROM tried;

-- a row of all kinds, inserted and changed under hostile settings
CREATE TYPE mood AS ENUM ('sad', 'it''s "ok"');
CREATE DOMAIN short AS varchar(10) CHECK (value <> 'x');
CREATE DOMAIN shorter AS short;
CREATE DOMAIN stamps AS timestamptz[];
CREATE TYPE pair AS (a integer, "B b" timestamptz, c shorter);
CREATE TYPE pairs AS (p pair[], r tstzrange);
CREATE DOMAIN checked_pair AS pair CHECK ((value).a > 0);
CREATE TYPE moodrange AS RANGE (subtype = mood);
CREATE TYPE moneyrange AS RANGE (subtype = money);
CREATE TABLE kinds (
	id integer PRIMARY KEY,
	gone_1 text DEFAULT 'gone',
	"select" mood, "a""b" short, "c\d" shorter, "ñ 日" text[], e integer[][], f pair, g pair[], h pairs, i checked_pair, j moodrange, k moneyrange, l stamps,
	gone_2 integer DEFAULT 2,
	m "char", n name, o money, p timestamptz, q bytea, r json, s jsonb, t xml, u numeric(10,3), v text, w char(5), x mood[], y tstzmultirange,
	aa integer GENERATED ALWAYS AS (id * 2) STORED,
	gone_3 text);
SELECT softmobile.attach('kinds', 'kinds');
CREATE FUNCTION agrees(relation regclass) RETURNS TABLE (op "char", id text, agrees boolean, old text) LANGUAGE sql AS $$
	SELECT e.op, e.id, j.json = o.json, e.payload ->> 'old'
	FROM shop.fresh() e
		CROSS JOIN LATERAL (SELECT (e.payload -> CASE e.op WHEN 'd' THEN 'old' ELSE 'new' END)::text AS json) AS j
		CROSS JOIN LATERAL (SELECT shop.oracle(relation, 'id = ' || e.id) AS json) AS o
	ORDER BY e.place
$$;
INSERT INTO kinds (id) VALUES (1);
INSERT INTO kinds VALUES (2, DEFAULT, 'it''s "ok"', 'abc', 'def', '{a,NULL,"b \"c\"",""}', '{{1,2},{3,NULL}}', '(1,"2026-01-01 00:00+00",x y)',
	'{"(1,,)",NULL,"(2,\"2026-06-01 00:00+00\",z)"}', '("{""(5,,)""}","[2026-01-01 00:00+00,2026-02-01 00:00+00)")', '(7,"1999-12-31 23:59:59.5+00",)',
	'[sad,"it''s ""ok"""]', '[1.50,2.50)', '{2026-01-01 00:00+00,-infinity}', DEFAULT, 'x', 'a name', '-12.34', '2026-01-01 12:00:00.120+00', '\x00ff27', '{"a" :  1}', '{"a" :  1}',
	'<a b="c">&amp;</a>', 1.5, E'quote " back \\ slash / \u0001 \u001f \u007f \u00a0 \u2028 ñ 😀', 'pad', '{sad}', '{[2026-01-01 00:00+00,2026-01-02 00:00+00)}', DEFAULT, NULL);
SELECT * FROM agrees('kinds');
ALTER TABLE kinds DROP COLUMN gone_1, DROP COLUMN gone_2, DROP COLUMN gone_3;
ALTER TABLE kinds ADD COLUMN later timestamptz DEFAULT '2026-03-01 00:00+00', ADD COLUMN later_2 text DEFAULT 'default', ADD COLUMN later_3 pair DEFAULT '(1,,)';
UPDATE kinds SET u = u WHERE id = 1;
SELECT * FROM agrees('kinds');
UPDATE kinds SET v = v WHERE id = 2;
SELECT * FROM agrees('kinds');
UPDATE kinds SET u = 1.500, later_2 = 'changed', f = '(2,,)', p = '2026-01-01 13:00:00.120+00' WHERE id = 2;
SELECT * FROM agrees('kinds');
UPDATE kinds SET "select" = NULL, later = NULL, "ñ 日" = '{}', g = '{}' WHERE id = 2;
SELECT * FROM agrees('kinds');
UPDATE kinds SET id = 3 WHERE id = 2;
SELECT op, agrees, length(old) > 0 AS old FROM agrees('kinds') WHERE op = 'i';
-- the deleted row as it was
CREATE TABLE before AS SELECT oracle('kinds', 'id = 3') AS json;
DELETE FROM kinds WHERE id = 3;
SELECT op, (payload -> 'old')::text = json AS agrees FROM fresh(), before;
SELECT current_setting('datestyle') AS datestyle, current_setting('timezone') AS timezone, current_setting('bytea_output') AS bytea_output;
RESET ALL;
SET search_path = shop;
SET softmobile.branch_id = 'S1';
SET softmobile.reason = 'regression test';

-- long values: compressed, out of line; an update does not list those that it leaves alone
CREATE TABLE long (id integer PRIMARY KEY, n integer DEFAULT 0, main text, plain text, ext text, arr text[], js jsonb);
ALTER TABLE long ALTER main SET STORAGE main, ALTER ext SET STORAGE external;
SELECT softmobile.attach('long', 'long');
INSERT INTO long SELECT 1, 0, repeat('main ', 1000), repeat('compressible "', 80000), (SELECT string_agg(md5(i::text), '') FROM generate_series(1, 32768) i),
	array_fill(repeat('x', 100), '{1000}'), (SELECT jsonb_agg(md5(i::text)) FROM generate_series(1, 20000) i);
SELECT pg_column_size(ext) > 1000000 AS megabyte FROM long;
SELECT op, id, agrees FROM agrees('long');
UPDATE long SET n = n + 1;
SELECT op, id, agrees, old FROM agrees('long');
-- written anew with the same content: not a change either
UPDATE long SET ext = ext || '', plain = left(plain, -1) || right(plain, 1), js = js || '[]', arr = arr || '{}'::text[];
SELECT op, id, agrees, old FROM agrees('long');
UPDATE long SET ext = 'x' || substr(ext, 2), n = 0;
SELECT op, agrees, (SELECT array_agg(k) FROM json_object_keys(old::json) k) AS changed FROM agrees('long');
SELECT op, (payload -> 'old' ->> 'ext') = md5('1') || substr(ext, 33) AS old_text_whole FROM events, long WHERE entity = 'long' ORDER BY place DESC LIMIT 1;
DELETE FROM long;
SELECT op, length(payload::text) > 2000000 AS whole FROM fresh();

-- images are compared, not meanings
CREATE TABLE image (id integer PRIMARY KEY, n numeric, f double precision, c text COLLATE "C");
SELECT softmobile.attach('image', 'image');
INSERT INTO image VALUES (1, 1.0, 0, 'a');
UPDATE image SET n = 1.00, f = '-0';
UPDATE image SET n = 'NaN', f = 'NaN';
UPDATE image SET n = 'NaN', f = 'NaN';
SELECT op, payload FROM fresh();

-- a type that brings a cast to json; one that gets it later
CREATE TYPE weight AS ENUM ('kg', 'lb');
CREATE TABLE weighed (id integer PRIMARY KEY, w weight, ws weight[]);
SELECT softmobile.attach('weighed', 'weighed');
INSERT INTO weighed VALUES (1, 'kg', '{kg,lb}');
CREATE FUNCTION weight_json(weight) RETURNS json LANGUAGE sql IMMUTABLE AS $$ SELECT json_build_object('unit', $1::text) $$;
CREATE CAST (weight AS json) WITH FUNCTION weight_json(weight);
INSERT INTO weighed VALUES (2, 'lb', '{lb}');
SELECT op, payload FROM fresh();
SELECT count(*) AS agree FROM weighed t JOIN events e ON e.entity = 'weighed' AND e.id = t.id::text AND t.id = 2 AND e.payload::text = '{"new":' || row_to_json(t)::text || '}';

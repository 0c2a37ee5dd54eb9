-- central_parse() takes nothing that is read otherwise event by event, or by PostgreSQL's own JSON functions.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
SELECT setseed(0.3);

-- The oracle: what central_parse() was, in SQL.
CREATE FUNCTION oracle(doc json) RETURNS softmobile.central_event[] LANGUAGE sql STABLE
BEGIN ATOMIC
	SELECT array_agg(ROW(r.n::integer, CASE WHEN position('%' IN r.source) = 0 THEN substr(r.source, 11) ELSE softmobile.central_decode(substr(r.source, 11)) END,
		r.id, r.epoch, r.epochno, r.lane, r.sequence, CASE WHEN r.snapshot = 'true' THEN 0 ELSE r.epochno END,
		r.entity_type, r.subject, r.op, r."time"::timestamptz, r.actor, r.reason, r.resolution, r.data, r.new, r.old)::softmobile.central_event)
	FROM (
		SELECT d.*, d.d -> 'new' AS new, d.d -> 'old' AS old, split_part(d.type, '.', 2) AS entity_type, split_part(d.type, '.', 3) AS op
		FROM (
			SELECT b.*, b.data::jsonb AS d
			FROM ROWS FROM (json_to_recordset(doc) AS (specversion text, id uuid, source text, type text, subject text, "time" text,
					sequence bigint, lane text, epoch uuid, epochno integer, reason text, actor text, resolution text, snapshot text, data json))
				WITH ORDINALITY AS b (specversion, id, source, type, subject, "time", sequence, lane, epoch, epochno, reason, actor, resolution, snapshot, data, n)
			OFFSET 0) AS d
		OFFSET 0) AS r
	HAVING bool_and((r.specversion = '1.0' AND r.id IS NOT NULL AND r.epoch IS NOT NULL AND r.epochno > 0 AND r.sequence BETWEEN 1 AND 9223372036854775806
		AND r.source LIKE '/branches/_%' AND octet_length(r.subject) BETWEEN 1 AND 2000 AND r.lane IN ('high', 'normal', 'low')
		AND r.type = 'softmobile.' || r.entity_type || '.' || r.op AND octet_length(r.entity_type) BETWEEN 1 AND 100
		AND r."time" LIKE '____-__-__T__:__:__%Z'
		AND CASE r.op WHEN 'insert' THEN jsonb_typeof(r.new) = 'object'
			WHEN 'update' THEN jsonb_typeof(r.new) = 'object' AND jsonb_typeof(r.old) = 'object'
			WHEN 'delete' THEN jsonb_typeof(r.old) = 'object' ELSE false END
		AND coalesce(r.resolution IN ('local', 'central'), true)) IS TRUE);
END;
CREATE FUNCTION reference(body text) RETURNS softmobile.central_event[] LANGUAGE plpgsql AS $$
DECLARE
	doc json := body::json;
	singly softmobile.central_event[];
	events softmobile.central_event[] := oracle(doc);
BEGIN
	singly := ARRAY(SELECT softmobile.central_parse_event(x.value, x.n::int) FROM json_array_elements(doc) WITH ORDINALITY AS x (value, n));
	RETURN CASE WHEN singly::text = events::text THEN events END;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
	RETURN NULL;
END $$;
CREATE FUNCTION parsed(body text) RETURNS softmobile.central_event[] LANGUAGE plpgsql AS $$
BEGIN
	RETURN softmobile.central_parse(body);
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
	RETURN NULL;
END $$;

-- As the worker writes them: every operation, every attribute, escapes, nested and repeated values.
CREATE FUNCTION written(source text, type text, subject text, extra text, data text, seq int) RETURNS text LANGUAGE sql RETURN
	format('{"specversion":"1.0","id":"%s","source":"/branches/%s","type":"softmobile.%s","subject":%s,"time":"2025-11-24T13:16:%s.77864%sZ","datacontenttype":"application/json","sequence":"%s","lane":"%s","epoch":"821a7e85-1731-412e-b79e-bf40072ef4a4","epochno":"435378747"%s,"data":%s}',
		gen_random_uuid(), source, type, to_json(subject), 10 + seq, seq, seq, (ARRAY['high', 'normal', 'low'])[1 + seq % 3], extra, data);
CREATE TABLE usual (place int PRIMARY KEY, event text);
INSERT INTO usual VALUES
	(1, written('b', 'sale.insert', '1', ',"reason":"Venta en tienda","actor":"pos"', '{"new":{"id":1,"folio":"F-1","total":10.50,"paid":true,"note":null,"at":"2025-11-24T08:00:00+00:00"}}', 1)),
	(2, written('b%201', 'sale.update', 'a "b" \ c', ',"reason":"\u00d1and\u00fa \ud83d\ude00 \"x\" \n","actor":"p\\q"', '{"new":{"id":-1e3,"t":"\u0041\/\b\f\n\r\t"},"old":{"t":""}}', 2)),
	(3, written('%C3%91u%C3%B1oa%202%', 'inventory_movement.delete', 'Ñandú 日本 😀', '', '{"old":{"a":[1,2.0,[],{},{"b":[null,false,"]"]}],"a ":{"c":{"d":"}"}}}}', 3)),
	(4, written('b', 'item.insert', 'S', ',"snapshot":"true"', '{"new":{"k":{"k":1,"k":2},"":3}}', 4)),
	(5, written('b', 'item.update', 'R', ',"resolution":"central"', '{"new":{},"old":{}}', 5));
CREATE FUNCTION body() RETURNS text LANGUAGE sql RETURN (SELECT '[' || string_agg(event, ',' ORDER BY place) || ']' FROM usual);

SELECT is(cardinality(parsed(body())), 5, 'a batch as the worker writes it is read');
SELECT is(parsed(body())::text, reference(body())::text, 'as the oracle reads it');
SELECT is(parsed('[' || event || ']')::text, reference('[' || event || ']')::text, 'event ' || place || ' alone') FROM usual ORDER BY place;
SELECT is(parsed(replace(replace(body(), ',', E'\n,\t'), ':{', ' : { '))::text, reference(replace(replace(body(), ',', E'\n,\t'), ':{', ' : { '))::text, 'white space between tokens, kept in data');
SELECT is(parsed((SELECT '[' || string_agg(replace(event, '":"', '" : "'), ',' ORDER BY place DESC) || ']' FROM usual))::text,
	reference((SELECT '[' || string_agg(replace(event, '":"', '" : "'), ',' ORDER BY place DESC) || ']' FROM usual))::text, 'another order of events');
SELECT is(cardinality(parsed((SELECT '[' || string_agg(u.event, ',') || ']' FROM usual u, generate_series(1, 2000) WHERE u.place = 1))), 2000, 'thousands');
SELECT is(parsed(x), NULL, 'left to central_parse_event(): ' || left(coalesce(x, 'NULL'), 20))
	FROM unnest(ARRAY[NULL, '', ' ', '[]', '{}', 'null', '7', '[7]', '[{}]', '[[]]', '[', ']', body() || ',', body() || ']', left(body(), -1), repeat('[', 100000),
		replace(body(), '{"a":[1', '{"a":[' || repeat('[', 1000000))]) AS x;
SELECT is(parsed(y), NULL, 'not read: ' || replacement)
FROM (VALUES ('"lane":"high"', '"lane":"high","lane":"high"'), ('"id":1,"folio"', '"id":1,"id":1,"folio"'), ('"old":{"t"', '"old":{"t":"","\u0074"'), ('"lane":"high"', '"Lane":"high"'), ('"sequence":"1"', '"sequence":1'), ('"sequence":"1"', '"sequence":"0"'), ('"sequence":"1"', '"sequence":""'),
		('"sequence":"1"', '"sequence":"9999999999999999999999999999"'), ('"epochno":"435378747"', '"epochno":"2147483648"'), ('"reason":"Venta en tienda"', '"reason":null'), ('"reason":"Venta', '"x":1,"reason":"Venta'),
		('Venta', '\u0000'), ('Venta', '\ud800'), ('F-1', '\u0000'), ('F-1', '\x'), ('F-1', E'\n'), ('10.50', '01'), ('10.50', '1e999999'), ('10.50', 'NaN'), ('true', 'TRUE'), ('{"new":{', '{"new":[{'), ('{"new":{', '{"new":{,'),
		('}}', ',}}'), ('}}', '},}'), ('[1,2.0', '[1,,2.0'), ('[1,2.0', '[,1'), ('"]"]', '"]",]'), ('{"new"', '{"x":1,"new"'), ('{"old"', '{"old":{},"old"'), ('"data"', '"date"'), ('"time":"2025', '"time":"2O25'),
		('2025-11-24T13', '2025-13-24T13'), ('2025-11-24T13', '2025-11-24T33'), ('"subject":"1"', '"subject":""'), ('/branches/b"', '/branches/"'), ('/branches/b"', '/branches/%FF"'), ('/branches/b"', '/branches/%00"'),
		('sale.insert', 'sale.upsert'), ('sale.insert', 'sale.insert.'), ('sale.insert', '.insert'), ('sale.insert', 'sale'), ('"1.0"', '"1.1"'), ('-a4a4', '-a4a')) AS v (original, replacement),
	LATERAL (SELECT replace(body(), original, replacement)) AS x (y) WHERE replacement <> '-a4a';
SELECT is(parsed(replace(body(), '"subject":"1"', format('"subject":"%s"', repeat('é', n))))::text, reference(replace(body(), '"subject":"1"', format('"subject":"%s"', repeat('é', n))))::text, n || ' characters of two bytes')
	FROM unnest('{1000,1001}'::int[]) AS n;
SELECT is(parsed(replace(body(), 'sale.', repeat('t', n) || '.'))::text, reference(replace(body(), 'sale.', repeat('t', n) || '.'))::text, 'an entity type of ' || n) FROM unnest('{100,101}'::int[]) AS n;

-- Bodies spoilt at random: what is read nevertheless is read alike.
CREATE FUNCTION spoilt(body text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
	at int;
	width int;
	pieces CONSTANT text[] := '{"\"",",",":","{","}","[","]","\\","0","1","-",".","e","%","%41","true","null","\"\"","{}","[]"," ","é","\\u00e9","\\u0000","\"new\"","\"data\":","\"id\":","Z"}';
BEGIN
	FOR i IN 1 .. 1 + floor(random() * 3)::int LOOP
		at := 1 + floor(random() * length(body))::int;
		width := CASE WHEN random() < 0.5 THEN 0 WHEN random() < 0.8 THEN 1 ELSE floor(random() * 40)::int END;
		body := overlay(body PLACING CASE WHEN width > 0 AND random() < 0.5 THEN '' ELSE pieces[1 + floor(random() * cardinality(pieces))::int] END FROM at FOR width);
	END LOOP;
	RETURN body;
END $$;
CREATE TABLE tried AS SELECT n, spoilt AS body, parsed(spoilt) AS events FROM (SELECT n, spoilt(body()) FROM generate_series(1, 4000) AS n OFFSET 0) AS x;
SELECT cmp_ok((SELECT count(*) FROM tried WHERE events IS NOT NULL), '>', 100::bigint, 'many spoilt bodies can still be read');
SELECT cmp_ok((SELECT count(*) FROM tried WHERE events IS NULL), '>', 1000::bigint, 'and many not');
SELECT is((SELECT jsonb_agg(jsonb_build_object('n', n, 'body', body)) FROM tried WHERE events IS NOT NULL AND events::text IS DISTINCT FROM reference(body)::text), NULL, 'all that is read is what the oracle and central_parse_event() read');

SELECT is(softmobile.central_decode(x), y, 'decoded: ' || x) FROM (VALUES ('a', 'a'), ('%41', 'A'), ('%', '%'), ('%4', '%4'), ('%4g%41', '%4gA'), ('%c3%B1ñ', 'ññ'), ('', '')) AS v (x, y);
SELECT throws_ok(format('SELECT softmobile.central_decode(%L)', x), '22021', NULL, 'no UTF-8: ' || x) FROM unnest('{%FF,%C3,%00,a%ED%A0%80}'::text[]) AS x;

SELECT * FROM finish();
ROLLBACK;

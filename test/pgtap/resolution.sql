-- Conflicts as central sees them resolved: by the event that was in conflict, by those behind it, by the one that takes over central's row.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();

CREATE TABLE tok AS SELECT sha256(convert_to(softmobile.central_create_token('{b1}', 'server 1'), 'UTF8')) AS hash;
-- An event of entity X; its id is made of its number.
CREATE FUNCTION u(n int) RETURNS uuid LANGUAGE sql RETURN ('00000000-0000-7000-8000-' || lpad(n::text, 12, '0'))::uuid;
CREATE FUNCTION post(seq int, op text, new json, old json DEFAULT NULL, resolution text DEFAULT NULL) RETURNS text
LANGUAGE sql AS $$
	SELECT coalesce(r #>> '{results,0,status}', 'accepted ' || (r ->> 'accepted')) FROM softmobile.central_receive(json_build_array(jsonb_strip_nulls(jsonb_build_object(
		'specversion', '1.0', 'id', u(seq), 'source', '/branches/b1', 'type', 'softmobile.item.' || op, 'subject', 'X', 'time', '2025-11-24T08:00:00Z',
		'sequence', seq::text, 'lane', 'high', 'epoch', u(0), 'epochno', '10', 'reason', 'Venta en tienda', 'actor', 'pos', 'resolution', resolution,
		'data', jsonb_strip_nulls(jsonb_build_object('new', new, 'old', old)))))::text, (SELECT hash FROM tok)) AS t, json(t) AS r
$$;
CREATE FUNCTION held() RETURNS jsonb LANGUAGE sql AS $$ SELECT row FROM softmobile.central_projection WHERE entity_id = 'X' $$;
CREATE FUNCTION hq(new_row jsonb) RETURNS void LANGUAGE sql AS $$ SELECT softmobile.central_change('b1', 'item', 'X', new_row, 'price list 12') $$;
CREATE FUNCTION open_conflicts() RETURNS int LANGUAGE sql AS $$ SELECT count(*)::int FROM softmobile.central_conflicts $$;

/* For the branch: its whole row, the columns included that only headquarters had changed. */
SELECT is(post(1, 'insert', '{"price":10,"name":"phone"}'), 'accepted 1', 'an item');
SELECT hq('{"price":40,"name":"smartphone"}');
SELECT is(post(2, 'update', '{"price":11,"name":"phone"}', '{"price":10}'), 'conflict', 'both sides change its price');
SELECT is(post(2, 'update', '{"price":11,"name":"phone"}', '{"price":10}', 'local'), 'accepted 1', 'resolved for the branch');
SELECT is(held(), '{"price":11,"name":"phone"}', 'central holds the branch''s row');
SELECT is(open_conflicts(), 0, 'the conflict is closed');
SELECT is(post(3, 'update', '{"price":11,"name":"tablet"}', '{"name":"phone"}'), 'accepted 1', 'what waited behind it is none');
SELECT is(held(), '{"price":11,"name":"tablet"}', 'and both sides hold the same');

/* For the branch, but headquarters has changed the row again: nothing that nobody has seen is overwritten. */
SELECT hq('{"price":40,"name":"tablet"}');
SELECT is(post(4, 'update', '{"price":12,"name":"tablet"}', '{"price":11}'), 'conflict', 'again in conflict');
SELECT hq('{"price":41,"name":"tablet"}');
SELECT is(post(4, 'update', '{"price":12,"name":"tablet"}', '{"price":11}', 'local'), 'conflict', 'what was decided was another row: a conflict still');
SELECT is((SELECT central_row ->> 'price' FROM softmobile.central_conflicts), '41', 'with the row of now');
SELECT is(post(4, 'update', '{"price":12,"name":"tablet"}', '{"price":11}', 'local'), 'accepted 1', 'decided on that row');
SELECT is(held() ->> 'price', '12', 'it is the branch''s');

/* For central: the branch's row was changed on; its triggers stamp each change. */
SELECT hq('{"price":50,"name":"tablet"}');
SELECT is(post(5, 'update', '{"price":13,"name":"tablet","at":5}', '{"price":12,"at":4}'), 'conflict', 'a third time');
SELECT is(post(5, 'update', '{"price":13,"name":"tablet","at":5}', '{"price":12,"at":4}', 'central'), 'accepted 1', 'resolved for central');
SELECT is(post(6, 'update', '{"price":14,"name":"tablet","at":6}', '{"price":13,"at":5}', 'central'), 'accepted 1', 'so is what waited');
SELECT is((SELECT string_agg(effect, ' ' ORDER BY seq) FROM softmobile.central_inbox WHERE seq IN (5, 6)), 'overruled overruled', 'both are kept');
SELECT is(held(), '{"price":50,"name":"tablet"}', 'without effect');
SELECT is(post(7, 'update', '{"price":50,"name":"tablet","at":7}', '{"price":14,"at":6}', 'local'), 'accepted 1', 'the event by which the branch took over central''s row');
SELECT is(held(), '{"price":50,"name":"tablet","at":7}', 'makes both rows equal');
SELECT is((SELECT changed_here FROM softmobile.central_projection), false, 'and headquarters'' change is known to the branch');
SELECT is(open_conflicts(), 0, 'no conflict is left');

/* For central, but headquarters changes the row again before the branch's takeover arrives. */
SELECT hq('{"price":60,"name":"tablet","at":7}');
SELECT is(post(8, 'update', '{"price":15,"name":"tablet","at":8}', '{"price":50,"at":7}'), 'conflict', 'a fourth time');
SELECT is(post(8, 'update', '{"price":15,"name":"tablet","at":8}', '{"price":50,"at":7}', 'central'), 'accepted 1', 'resolved for central');
SELECT hq('{"price":61,"name":"tablet","at":7}');
SELECT is(post(9, 'update', '{"price":60,"name":"tablet","at":9}', '{"price":15,"at":8}', 'local'), 'conflict', 'the takeover of the price before does not overwrite the new one');
SELECT is(held() ->> 'price', '61', 'which stays');
SELECT is(post(9, 'update', '{"price":60,"name":"tablet","at":9}', '{"price":15,"at":8}', 'central'), 'accepted 1', 'resolved once more');
SELECT is(post(10, 'update', '{"price":61,"name":"tablet","at":10}', '{"price":60,"at":9}', 'local'), 'accepted 1', 'the next takeover');
SELECT is(held(), '{"price":61,"name":"tablet","at":10}', 'comes through');

/* Rows deleted on one side. */
SELECT hq(NULL);
SELECT is(post(11, 'update', '{"price":16,"name":"tablet","at":11}', '{"price":61,"at":10}'), 'conflict', 'headquarters has deleted it');
SELECT is(post(11, 'update', '{"price":16,"name":"tablet","at":11}', '{"price":61,"at":10}', 'central'), 'accepted 1', 'resolved for central');
SELECT is(post(12, 'delete', NULL, '{"price":16,"name":"tablet","at":11}', 'local'), 'accepted 1', 'the branch deletes it too');
SELECT is((SELECT deleted FROM softmobile.central_projection), true, 'it is gone on both sides');
SELECT is(post(13, 'insert', '{"price":1,"name":"tablet"}'), 'accepted 1', 'it comes back');
SELECT hq('{"price":2,"name":"tablet"}');
SELECT is(post(14, 'delete', NULL, '{"price":1,"name":"tablet"}'), 'conflict', 'the branch deletes what headquarters has changed');
SELECT is(post(14, 'delete', NULL, '{"price":1,"name":"tablet"}', 'central'), 'accepted 1', 'resolved for central');
SELECT is(post(15, 'insert', '{"price":2,"name":"tablet","at":0}', NULL, 'local'), 'accepted 1', 'the branch takes the row over');
SELECT is(held(), '{"price":2,"name":"tablet","at":0}', 'and has it again');
SELECT hq(NULL);
SELECT is(post(16, 'update', '{"price":3,"name":"tablet","at":0}', '{"price":2}'), 'conflict', 'deleted at headquarters, changed at the branch');
SELECT is(post(16, 'update', '{"price":3,"name":"tablet","at":0}', '{"price":2}', 'local'), 'accepted 1', 'resolved for the branch');
SELECT is(held(), '{"price":3,"name":"tablet","at":0}', 'headquarters has it again');
SELECT is(open_conflicts(), 0, 'no conflict is left');

SELECT * FROM finish();
ROLLBACK;

-- At central: the branch's rows (through the foreign data wrapper) beside the projection, each compared whole, counted by table.
CREATE VIEW shop.compared AS
WITH branch_rows (entity_type, "table", entity_id, row) AS (
	SELECT 'sale', 'ventas', id::text, to_jsonb(t) FROM shop.ventas AS t
	UNION ALL SELECT 'sale_line', 'detalle_ventas', id::text, to_jsonb(t) FROM shop.detalle_ventas AS t
	UNION ALL SELECT 'inventory_movement', 'inventory_movements', id::text, to_jsonb(t) FROM shop.inventory_movements AS t
	UNION ALL SELECT 'device', 'devices', id::text, to_jsonb(t) FROM shop.devices AS t
	UNION ALL SELECT 'customer', 'clientes', id::text, to_jsonb(t) FROM shop.clientes AS t
	UNION ALL SELECT 'sale_return', 'sale_returns', id::text, to_jsonb(t) FROM shop.sale_returns AS t
	UNION ALL SELECT 'repair_order', 'repair_orders', id::text, to_jsonb(t) FROM shop.repair_orders AS t
	UNION ALL SELECT 'transfer_order', 'transfer_orders', id::text, to_jsonb(t) FROM shop.transfer_orders AS t
), central_rows AS (
	SELECT p.entity_type, p.entity_id, p.row FROM softmobile.central_projection AS p WHERE p.branch_id = 'norte' AND NOT p.deleted
)
SELECT coalesce(b."table", c.entity_type) AS "table", b.row AS branch, c.row AS central
FROM branch_rows AS b FULL JOIN central_rows AS c USING (entity_type, entity_id);

\pset footer off
SELECT "table", count(branch) AS branch, count(central) AS central, count(*) FILTER (WHERE branch IS DISTINCT FROM central) AS different,
	to_char(sum((branch ->> 'total')::numeric), 'FM999,999,999,990.00') AS "branch total",
	to_char(sum((central ->> 'total')::numeric), 'FM999,999,999,990.00') AS "central total"
FROM shop.compared GROUP BY 1 ORDER BY 1;
